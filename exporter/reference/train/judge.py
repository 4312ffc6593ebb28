"""Training of the judge on renders alone: both of its encoders learn to say what is where.

Coordinates of the common space have a meaning: which shape, colour and size, if any, is alone, left, right, at the top
or at the bottom, and which background. Each encoder learns that by itself, and a step teaches every fact of every
image. Contrast with wrong prompts, with or without an auxiliary head, still took left for right and circles for squares
after 800 steps; this way has all facts of four images in five right after 500.

Nothing of the generator is seen here, and nothing here is seen by the generator.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from exporter.reference.grammar import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, scenes
from exporter.reference.render import IMAGE_SIZE, render_many
from exporter.reference.train.data import to_tensor
from exporter.reference.train.denoiser import prompt_ids, text_config
from exporter.reference.train.folders import half, replace_folder, state_float32
from exporter.reference.train.loop import Loss, Plan, Run
from exporter.reference.train.setup import Setup
from exporter.reference.train.words import build_tokenizer

WIDTH = 128
SCALE = 50.0
"""What cosines are multiplied with before the softmax; also the model's ``logit_scale``."""
PLACES = ("alone", "left", "right", "top", "bottom")
_PLACES_OF = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
FACTS = (len(BACKGROUNDS), *(1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SIZES)) * len(PLACES))
"""Number of answers to each question about a scene; their coordinates come first in the embedding, in this order."""
_USED_TOKENS = 18  # the longest prompt has 18; causal attention and pooling at the first end token ignore the rest
_ABSENT = 0.25  # weight of the facts about an empty place


@dataclasses.dataclass(frozen=True)
class JudgePlan(Plan):
    """Plan of the judge.

    Attributes:
        batch: Images, and as many prompts, a step.
    """

    batch: int = 64


JUDGE_PLAN = JudgePlan(
    name="judge", steps=2000, rate=1.5e-3, warmup=50, decay=0.5, ema=0.99, save_every=100, log_every=25
)


def build_judge(seed: int, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return the judge with fresh weights.

    Args:
        seed: Seed of the weights.
        tokenizer: Tokenizer of the prompts.

    Returns:
        A `CLIPModel`, float32 on the CPU, for images (n, 3, 64, 64) in -1 to 1; its ``logit_scale`` is not trained.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    text = text_config(tokenizer, layers=3)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    config.logit_scale_init_value = math.log(SCALE)
    judge = CLIPModel(config)
    judge.logit_scale.requires_grad_(requires_grad=False)
    return judge


def facts_of(drawn: list[Scene]) -> torch.Tensor:
    """Say what is where: the answers that both encoders learn.

    Args:
        drawn: n scenes.

    Returns:
        int64 (n, 16): the background, then shape, colour and size at each of `PLACES`, 0 for an empty place.
    """
    found = torch.zeros((len(drawn), len(FACTS)), dtype=torch.int64)
    for row, scene in enumerate(drawn):
        found[row, 0] = BACKGROUNDS.index(scene.background)
        places = _PLACES_OF[scene.relation] if scene.relation else ("alone",)
        for thing, place in zip(scene.things, places, strict=True):
            at = 1 + 3 * PLACES.index(place)
            values = [SHAPES.index(thing.shape), COLOURS.index(thing.colour), SIZES.index(thing.size)]
            found[row, at : at + 3] = torch.tensor(values) + 1
    return found


def answers_of(embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split embeddings into the answers to each question.

    Args:
        embeddings: float32 (n, 128).

    Returns:
        16 tensors (n, answers), as wide as `FACTS` says.
    """
    return torch.split(embeddings[:, : sum(FACTS)], list(FACTS), dim=1)


def facts_loss(embeddings: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of all answers; those about an empty place count a quarter.

    Args:
        embeddings: Unit vectors, float32 (n, 128).
        facts: int64 (n, 16).

    Returns:
        A scalar: the sum over the questions, the mean over the scenes.
    """
    total = embeddings.new_zeros(())
    for index, answers in enumerate(answers_of(SCALE * embeddings)):
        error = functional.cross_entropy(answers, facts[:, index], reduction="none")
        weight = 1.0 if index == 0 else torch.where(facts[:, index] > 0, 1.0, _ABSENT)
        total = total + (weight * error).mean()
    return total


def all_right(embeddings: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """Return the share of scenes of which every answer is right.

    Args:
        embeddings: float32 (n, 128).
        facts: int64 (n, 16).

    Returns:
        A scalar, 0 to 1.
    """
    found = torch.stack([answers.argmax(dim=1) for answers in answers_of(embeddings)], dim=1)
    return (found == facts).all(dim=1).float().mean()


def disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, tint and add noise, so that the judge looks at what is drawn and not at single pixels.

    Args:
        images: float32 (n, 3, 64, 64), -1 to 1.
        generator: Source of the strengths and of the noise.

    Returns:
        The same shape; each image with strengths of its own, a quarter of them unchanged by blur.
    """
    count, device = len(images), images.device

    def strength(low: float, high: float, channels: int = 1) -> torch.Tensor:
        drawn = torch.rand((count, channels, 1, 1), generator=generator, device=device)
        return low + (high - low) * drawn

    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = strength(-0.3, 0.9).clamp(min=0)
    images = images + share * (blurred - images)
    coarse = torch.randn((count, 3, 8, 8), generator=generator, device=device)
    coarse = functional.interpolate(coarse, size=images.shape[2:])
    fine = torch.randn(images.shape, generator=generator, device=device)
    images = images * strength(0.93, 1.0) + strength(-0.06, 0.06, 3)
    return (images + strength(0, 0.05) * coarse + strength(0, 0.08) * fine).clamp(-1, 1)


def embed(judge: CLIPModel, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed images and prompts, normalised.

    Args:
        judge: The network.
        images: float32 (n, 3, 64, 64).
        tokens: int64 (m, length).

    Returns:
        Unit vectors, (n, 128) and (m, 128).
    """
    seen = judge.visual_projection(judge.vision_model(pixel_values=images).pooler_output)
    said = judge.text_projection(judge.text_model(input_ids=tokens).pooler_output)
    return functional.normalize(seen, dim=-1), functional.normalize(said, dim=-1)


def judge_loss(judge: CLIPModel, tokenizer: CLIPTokenizer, plan: JudgePlan, seed: int) -> Loss:
    """Return the loss of both encoders on renders and prompts of scenes that are not held out.

    Args:
        judge: The network, in training.
        tokenizer: Tokenizer of the prompts.
        plan: Gives the batch size.
        seed: Seed of the run.

    Returns:
        The loss of a step, its parts, and the share of images of which every fact is right.
    """

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        number = seed * 1_000_000_000 + step
        drawn = scenes(number, plan.batch, held_out=False)
        images = disturb(to_tensor(render_many(drawn, number * plan.batch), judge.device), generator)
        tokens = prompt_ids(tokenizer, [scene.prompt for scene in drawn])[:, :_USED_TOKENS]
        seen, said = embed(judge, images, tokens.to(judge.device))
        facts = facts_of(drawn).to(judge.device)
        of_images, of_prompts = facts_loss(seen, facts), facts_loss(said, facts)
        total = of_images + of_prompts
        return {"loss": total, "images": of_images, "prompts": of_prompts, "right": all_right(seen.detach(), facts)}

    return loss


def save_judge(folder: Path, judge: CLIPModel) -> None:
    """Write the judge's folder.

    Args:
        folder: Where it goes; replaced as a whole.
        judge: The network.
    """
    facts = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }

    def write(fresh: Path) -> None:
        half(judge).save_pretrained(fresh, safe_serialization=True)
        build_tokenizer(fresh)
        state_float32(fresh / "config.json")
        (fresh / "preprocessor_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    replace_folder(folder, write)


def train_judge(setup: Setup, plan: JudgePlan, tell: Callable[[str], None]) -> None:
    """Train the judge, or take up its training, and write its folder.

    Args:
        setup: Where and how.
        plan: Length and rates.
        tell: Receives lines of progress.
    """
    tokenizer = build_tokenizer(setup.work / "tokenizer")
    judge = build_judge(setup.seed, tokenizer).to(setup.device)
    run = Run(plan, judge, setup.work, setup.seed)
    run.fit(judge_loss(judge, tokenizer, plan, setup.seed), tell)
    run.use_average()
    save_judge(setup.into / "judge", judge)
