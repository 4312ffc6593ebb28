"""Measures the finished model on held-out prompts and writes figures, sample grid and the README's table."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from exporter.reference.grammar import Scene, prompt_set, scene_from_prompt, scenes
from exporter.reference.judge import Judge
from exporter.reference.reader import agrees
from exporter.reference.render import render_many
from exporter.reference.train.data import to_tensor

Images = npt.NDArray[np.uint8]
STEPS = 20
PROMPTS = 2048
PROMPT_SEED = 100
NOISE_SEED = 500_000
RENDER_SEED = 7_000_000_000
GUIDANCES = (2.0, 3.0, 5.0, 7.5)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Args:
        hits: Number of successes.
        count: Number of trials, above 0.

    Returns:
        Lower and upper end, 0 to 1.
    """
    z = 1.959964
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def load_pipeline(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """Load the stock pipeline, silent.

    Args:
        folder: Pipeline folder.
        device: Where it runs.

    Returns:
        The pipeline in float32.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: StableDiffusionPipeline, prompts: list[str], guidance: float, first_seed: int) -> Images:
    """Generate one image a prompt; image `i` depends on its prompt and on seed `first_seed + i`.

    Args:
        pipeline: The pipeline.
        prompts: The prompts.
        guidance: Guidance scale.
        first_seed: Seed of the first image's noise.

    Returns:
        uint8 (n, 64, 64, 3), RGB.
    """
    parts = []
    for start in range(0, len(prompts), 64):
        chosen = prompts[start : start + 64]
        generators = [torch.Generator().manual_seed(first_seed + start + index) for index in range(len(chosen))]
        found = pipeline(
            chosen, num_inference_steps=STEPS, guidance_scale=guidance, generator=generators, output_type="np"
        ).images
        parts.append(np.rint(found * 255).astype(np.uint8))
    return np.concatenate(parts)


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cached_images(
    folder: Path, cache: Path, prompts: list[str], guidance: float, first_seed: int, tell: Callable[[str], None]
) -> Images:
    """Generate images in chunks of 256 that are kept, so that a killed evaluation goes on where it stopped.

    Args:
        folder: Pipeline folder.
        cache: Folder of the chunks; created.
        prompts: The prompts.
        guidance: Guidance scale.
        first_seed: Seed of the first image's noise.
        tell: Receives lines of progress.

    Returns:
        uint8 (n, 64, 64, 3), RGB.
    """
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{_fingerprint(folder)}-{hashlib.sha256(' | '.join(prompts).encode()).hexdigest()[:8]}"
    pipeline = load_pipeline(folder, torch.device("cpu"))
    parts = []
    for start in range(0, len(prompts), 256):
        path = cache / f"{name}-{guidance}-{first_seed}-{start}.npy"
        if not path.exists():
            found = generate(pipeline, prompts[start : start + 256], guidance, first_seed + start)
            temporary = path.with_suffix(".partial")
            with temporary.open("wb") as stream:
                np.save(stream, found, allow_pickle=False)
            temporary.replace(path)
        parts.append(np.load(path, allow_pickle=False))
        tell(f"generated {min(start + 256, len(prompts))}/{len(prompts)} images, guidance {guidance}")
    return np.concatenate(parts)


def reader_rate(images: Images, drawn: list[Scene]) -> npt.NDArray[np.bool_]:
    """Tell for each image whether the rule-based reader agrees with its scene.

    Args:
        images: uint8 (n, 64, 64, 3).
        drawn: n scenes.

    Returns:
        bool (n,).
    """
    return np.array([agrees(image, scene) for image, scene in zip(images, drawn, strict=True)])


def choose_guidance(folder: Path, cache: Path, tell: Callable[[str], None]) -> tuple[float, dict[str, float]]:
    """Choose the guidance by the rule-based reader on 128 trained prompts; the judge has no part in it.

    Args:
        folder: Pipeline folder.
        cache: Folder of generated images.
        tell: Receives lines of progress.

    Returns:
        The guidance with the highest rate (the lower one of equals), and the rate of each.
    """
    prompts = prompt_set("shapes-calibration")[:128]
    drawn = [scene_from_prompt(prompt) for prompt in prompts]
    rates = {}
    for guidance in GUIDANCES:
        images = cached_images(folder, cache, prompts, guidance, 40_000, tell)
        rates[str(guidance)] = float(reader_rate(images, drawn).mean())
        tell(f"guidance {guidance}: the reader agrees with {rates[str(guidance)]:.3f}")
    best = max(GUIDANCES, key=lambda guidance: (rates[str(guidance)], -guidance))
    return best, rates


def reconstruction_psnr(folder: Path, images: Images) -> float:
    """Return the autoencoder's mean PSNR.

    Args:
        folder: Pipeline folder.
        images: uint8 (n, 64, 64, 3).

    Returns:
        Decibels, mean over the images.
    """
    vae = load_pipeline(folder, torch.device("cpu")).vae
    values = []
    with torch.no_grad():
        for start in range(0, len(images), 64):
            target = to_tensor(images[start : start + 64], torch.device("cpu"))
            output = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
            values.append(10 * torch.log10(4 / (output - target).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(values).mean())


def _share(hits: npt.NDArray[np.bool_]) -> dict[str, float | int]:
    low, high = wilson(int(hits.sum()), len(hits))
    return {"rate": round(float(hits.mean()), 4), "low": round(low, 4), "high": round(high, 4), "count": len(hits)}


def save_grid(images: Images, path: Path, columns: int = 8, zoom: int = 2) -> None:
    """Write images as one PNG.

    Args:
        images: uint8 (n, 64, 64, 3), n a multiple of `columns`.
        path: The file.
        columns: Images a row.
        zoom: Size of a pixel.
    """
    rows = len(images) // columns
    size = images.shape[1]
    sheet = images[: rows * columns].reshape(rows, columns, size, size, 3).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(np.ascontiguousarray(sheet.reshape(rows * size, columns * size, 3)))
    picture.resize((columns * size * zoom, rows * size * zoom), Image.Resampling.NEAREST).save(path, optimize=True)


def evaluate(into: Path, work: Path, guidance: float | None, tell: Callable[[str], None]) -> dict[str, object]:
    """Measure the model, and write ``figures.json`` and ``samples.png``.

    Args:
        into: Folder with ``shapes`` and ``judge``; receives the files.
        work: Folder of the cache.
        guidance: Guidance scale, None to choose it by the reader.
        tell: Receives lines of progress.

    Returns:
        The figures.
    """
    folder, cache = into / "shapes", work / "evaluation"
    rates: dict[str, float] = {}
    if guidance is None:
        guidance, rates = choose_guidance(folder, cache, tell)
    drawn = scenes(PROMPT_SEED, PROMPTS, held_out=True)
    prompts = [scene.prompt for scene in drawn]
    images = cached_images(folder, cache, prompts, guidance, NOISE_SEED, tell)
    judge = Judge(into / "judge")
    renders = render_many(drawn, RENDER_SEED)
    judged, read = judge.rates(images, prompts), reader_rate(images, drawn)
    pairs = np.array([scene.relation is not None for scene in drawn])
    figures: dict[str, object] = {
        "steps": STEPS,
        "guidance": guidance,
        "guidance_by_reader_on_128_trained_prompts": rates,
        "prompts": {"count": PROMPTS, "seed": PROMPT_SEED, "held_out": True, "noise_seed": NOISE_SEED},
        "judge_first_of_17": _share(judged),
        "judge_first_of_17_one_thing": _share(judged[~pairs]),
        "judge_first_of_17_two_things": _share(judged[pairs]),
        "reader_right": _share(read),
        "reader_and_judge_agree": _share(judged == read),
        "clip_score_generated": round(float(judge.scores(images, prompts).mean()), 2),
        "clip_score_renders": round(float(judge.scores(renders, prompts).mean()), 2),
        "judge_on_fresh_renders": _share(judge.rates(renders, prompts)),
        "reader_on_fresh_renders": _share(reader_rate(renders, drawn)),
        "reconstruction_psnr_db": round(reconstruction_psnr(folder, renders[:512]), 2),
    }
    (into / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    save_grid(images[:48], into / "samples.png")
    return figures
