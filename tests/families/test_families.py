"""Every family the whole way: source, surgery, engines on two runtimes, measurements; held to diffusers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_families import MAKERS, PROMPTS, PRUNE

import exporter
from exporter.errors import RecipeError, SourceError
from exporter.networks.components import FAMILIES, NETWORK_CLASSES, components, denoiser
from exporter.networks.pipeline import load_pipeline
from exporter.networks.safety import CHECKER_CLASS
from exporter.networks.source import check_source
from exporter.networks.storage import load_network
from exporter.networks.weights import WEIGHT_STEMS
from exporter.preflight import check_recipe
from exporter.progress import Silent
from exporter.states import form_of
from exporter.tuning.base import TuneContext
from exporter.tuning.distill import Distill, DistillOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export's own

FINISHED = Callable[[str], Any]
each_family = pytest.mark.parametrize("family", list(MAKERS))


def drawn(pipeline: Any, family: str) -> np.ndarray:
    """Two images, called as a user of diffusers would call this very class."""
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    arguments["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in (0, 1)]
    if family in ("DDPMPipeline", "DDIMPipeline"):
        return np.asarray(pipeline(batch_size=2, **arguments).images)
    arguments["guidance_scale"] = 3.0
    if family == "DiTPipeline":
        labels = [207, pipeline.get_label_ids(["cat"])[0]]
        return np.asarray(pipeline(class_labels=labels, **arguments).images)
    if family == "PixArtAlphaPipeline":
        arguments |= {"use_resolution_binning": False, "clean_caption": False}
    return np.asarray(pipeline(["a cat", "a dog"], height=32, width=32, **arguments).images)


def test_every_supported_family_has_a_tiny_pipeline_here() -> None:
    assert {*MAKERS, "StableDiffusionPipeline"} == set(FAMILIES)
    used = {part.cls for name in FAMILIES for part in components(name)}
    assert used <= set(NETWORK_CLASSES) == set(WEIGHT_STEMS) - {CHECKER_CLASS}
    assert set(PROMPTS) <= set(MAKERS)


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("target", ["ort", "ov"])
def test_engines_draw_what_diffusers_draws(family: str, target: str, finished_of: FINISHED) -> None:
    made = finished_of(family)
    want = drawn(getattr(diffusers, family).from_pretrained(made.source), family)
    got = drawn(exporter.load(made.out / "engines" / "0-dense" / target), family)
    assert want.std() > 0.02
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("target", ["ort", "ov"])
def test_engines_encode_images_as_diffusers_does(family: str, target: str, finished_of: FINISHED) -> None:
    if not FAMILIES[family].on_request:
        pytest.skip("draws pixels: there is nothing to encode with")
    made = finished_of(family)
    engine = exporter.load(made.out / "engines" / "1-pruned" / target)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        want = getattr(diffusers, family).from_pretrained(made.source).vae.encode(images).latent_dist
    got = engine.vae.encode(images).latent_dist
    torch.testing.assert_close(got.parameters, want.parameters, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.mode(), engine.vae.encode(images, return_dict=False)[0].mean)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "ov"])
def test_diffusers_draws_from_an_image_on_engines(target: str, finished_of: FINISHED) -> None:
    """`vae_encoder` is all that image-to-image needs beyond what text-to-image does."""
    made = finished_of("StableDiffusionXLPipeline")
    image = np.random.default_rng(0).random((1, 32, 32, 3), dtype=np.float32)
    found = []
    for pipeline in (
        exporter.load(made.out / "engines" / "0-dense" / target),
        diffusers.StableDiffusionXLPipeline.from_pretrained(made.source),
    ):
        drawing = diffusers.StableDiffusionXLImg2ImgPipeline(**pipeline.components)
        drawing.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        found.append(drawing("a cat", image=image, num_inference_steps=4, generator=generator, output_type="np").images)
    np.testing.assert_allclose(*found, atol=2e-4)


@pytest.mark.slow
@each_family
def test_a_run_measures_every_cell(family: str, finished_of: FINISHED) -> None:
    record = finished_of(family).record
    assert record.exit_code == 0
    cells = {(cell.state, cell.target): cell for cell in record.cells}
    assert set(cells) == {(state, target) for state in ("0-dense", "1-pruned") for target in ("ort", "ov")}
    parts = {part.name for part in (*components(family), *FAMILIES[family].on_request)}
    for (state, _), cell in cells.items():
        assert cell.status == "ok", cell.error
        lowered = {found.component: found.value for found in cell.measurements if found.name == "lowering.psnr_db"}
        assert set(lowered) == parts
        assert all(value is not None and value > 70 for value in lowered.values())
        images = next(found for found in cell.measurements if found.name == "fidelity.image.psnr_db")
        assert images.value is not None
        assert (images.value > 60) == (state == "0-dense")
        kept = {found.component: found.value for found in cell.measurements if found.name == "latency.median_ms"}
        assert set(kept) >= parts


@pytest.mark.parametrize(
    ("family", "sampling", "told"),
    [
        (
            "LatentConsistencyModelPipeline",
            {"scheduler": "ddim"},
            "got 'ddim', expected source. Write scheduler: source",
        ),
        ("DDIMPipeline", {"scheduler": "euler"}, "got 'euler', expected source | ddim"),
        ("DDPMPipeline", {"guidance": 4}, "DDPMPipeline has no guidance; got 4"),
        ("DDPMPipeline", {"size": 32}, "images of its own size only; got 32, expected 16"),
        ("StableDiffusion3Pipeline", {"scheduler": "euler"}, "got 'euler', expected source"),
        ("StableDiffusion3Pipeline", {"size": 72}, "positions up to 64 pixels; got 72"),
        ("FluxPipeline", {"size": 36}, "got 36, expected a multiple of 8, .* Write 32"),
        ("StableDiffusionXLPipeline", {"size": 34}, "got 34, expected a multiple of 4, .* Write 32"),
    ],
)
def test_a_sampling_that_the_family_cannot_do_is_refused(
    family: str, sampling: dict[str, Any], told: str, recipe_of: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        check_recipe(recipe_of(family, **sampling), tmp_path / "out")


def test_distilled_schedulers_and_classes_have_limits(recipe_of: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="distilled to at most 50 steps; got 51"):
        check_recipe(recipe_of("LatentConsistencyModelPipeline", steps=51), tmp_path / "out")
    recipe = recipe_of("DiTPipeline")
    (tmp_path / "prompts.txt").write_text("207\na red circle\n")
    measure = recipe.measure.model_copy(update={"prompts": str(tmp_path / "prompts.txt")})
    with pytest.raises(RecipeError, match="DiTPipeline draws classes; got 'a red circle', expected a number from 0 to"):
        check_recipe(recipe.model_copy(update={"measure": measure}), tmp_path / "out")


def test_a_text_encoder_that_is_left_out_is_left_out(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MAKERS["StableDiffusion3Pipeline"](tmp_path / "parts")
    made.register_modules(text_encoder_3=None, tokenizer_3=None)
    made.save_pretrained(tmp_path / "pipeline")
    facts = check_source(tmp_path / "pipeline")
    assert set(facts.components) == {"text_encoder", "text_encoder_2", "transformer", "vae_decoder"}
    ours = load_pipeline(tmp_path / "pipeline")
    assert ours.text_encoder_3 is None
    want = drawn(made, "StableDiffusion3Pipeline")
    np.testing.assert_allclose(drawn(ours, "StableDiffusion3Pipeline"), want, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("FluxPipeline", "cannot add the noise of scheduler FlowMatchEulerDiscreteScheduler"),
        ("DiTPipeline", "got DiTPipeline, which draws classes"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_any_work(
    family: str, told: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher = load_pipeline(source_of(family))
    context = TuneContext(0, Silent(), tmp_path, lambda _: ["207"], 2, 3.0, 32, form_of(source_of(family)))
    with pytest.raises(RecipeError, match=told):
        Distill(DistillOptions(steps=1, prompts="mine")).tune(teacher.transformer, teacher, context)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family", ["StableDiffusionXLPipeline", "LatentConsistencyModelPipeline", "DDPMPipeline", "PixArtAlphaPipeline"]
)
def test_distillation_asks_the_denoiser_as_the_pipeline_does(
    family: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, part = source_of(family), denoiser(family)
    teacher, student = load_pipeline(source), load_network(source / part.folder, cls=part.cls)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.05)
    context = TuneContext(
        0,
        Silent(),
        tmp_path,
        lambda _: ["a cat", "a dog"],
        2,
        3.0,
        16 if family == "DDPMPipeline" else 32,
        form_of(source),
    )
    options = DistillOptions(steps=3, batch=2, samples=2, prompts="mine", ema=0.0, device="cpu")
    found = Distill(options).tune(student, teacher, context)
    assert 0 < found["error_after"] < found["error_before"]


def test_a_source_scheduler_that_does_not_fit_the_family_is_refused(
    source_of: Callable[[str], Path], recipe_of: Callable[..., Any], tmp_path: Path
) -> None:
    index = source_of("LatentConsistencyModelPipeline") / "model_index.json"
    text = index.read_text()
    try:
        index.write_text(text.replace("LCMScheduler", "PNDMScheduler"))
        with pytest.raises(SourceError, match="scheduler: unsupported class; got 'PNDMScheduler', expected one of LCM"):
            check_recipe(recipe_of("LatentConsistencyModelPipeline"), tmp_path / "out")
    finally:
        index.write_text(text)


def test_a_pipeline_of_pixels_has_no_encoder_to_ask_for(recipe_of: Callable[..., Any], tmp_path: Path) -> None:
    recipe = recipe_of("DDIMPipeline")
    asked = recipe.model_copy(update={"export": recipe.export.model_copy(update={"vae_encoder": True})})
    with pytest.raises(
        RecipeError, match=r"^export\.vae_encoder: DDIMPipeline has no such component; got true"
    ) as told:
        check_recipe(asked, tmp_path / "out")
    assert "StableDiffusionPipeline" in str(told.value)
    assert str(told.value).endswith("Remove export.vae_encoder.")


def test_a_component_that_the_family_does_not_have_is_refused(recipe_of: Callable[..., Any], tmp_path: Path) -> None:
    recipe = recipe_of("DDPMPipeline")
    stage = recipe.stages[0].model_copy(update={"prune": {**PRUNE, "component": "text_encoder"}})
    with pytest.raises(
        RecipeError, match=r"stages\[0\].prune.component: got 'text_encoder', expected denoiser \| unet"
    ):
        check_recipe(recipe.model_copy(update={"stages": (stage,)}), tmp_path / "out")
