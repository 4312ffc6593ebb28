"""Open shapes by family: engines at both ends of a range draw what diffusers draws, or the range is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import exporter
from exporter.errors import RecipeError
from exporter.preflight import check_recipe
from exporter.progress import Silent
from exporter.recipe import Recipe, Shapes
from exporter.run import run_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export's own
SIZES: dict[str, tuple[int, ...]] = {
    "StableDiffusion3Pipeline": (32, 48),
    "FluxPipeline": (32, 48),
    "PixArtAlphaPipeline": (32, 48),
    "DiTPipeline": (),
}


def _drawn(pipeline: Any, family: str, count: int, size: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    given["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in range(count)]
    if family == "DiTPipeline":
        return np.asarray(pipeline(class_labels=[207] * count, **given).images)
    if family == "PixArtAlphaPipeline":
        given |= {"use_resolution_binning": False, "clean_caption": False}
    return np.asarray(pipeline(["a cat"] * count, height=size, width=size, **given).images)


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_engines_draw_at_both_ends_of_a_range_what_diffusers_draws(
    family: str, recipe_of: Callable[..., Recipe], source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shapes = Shapes(batch=(1, 2), size=SIZES[family])
    recipe = recipe_of(family, batch=1).model_copy(update={"stages": (), "shapes": shapes})
    record = run_recipe(recipe, tmp_path / "out", progress=Silent())
    assert record.exit_code == 0, [cell.error for cell in record.cells]
    stock = getattr(diffusers, family).from_pretrained(source_of(family))
    for cell in record.cells:
        found = {(m.name, m.component): m for m in cell.measurements}
        component = "transformer"
        points = [(row["batch"], row["size"]) for row in found["latency.shapes_ms", component].detail["points"]]
        assert points == [(batch, size) for batch in (1, 2) for size in SIZES[family] or (32,)]
        assert cell.engine is not None
        engine = exporter.load(tmp_path / "out" / cell.engine)
        for count, size in (points[0], points[-1]):
            want = _drawn(stock, family, count, size)
            assert want.shape[:3] == (count, size, size)
            np.testing.assert_allclose(_drawn(engine, family, count, size), want, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("PixArtAlphaPipeline", (32, 44), "got 44, expected multiples of 8"),
        ("DiTPipeline", (32, 64), "draws images of its own size only; got .32, 64., expected none.*shapes.batch works"),
        ("DDPMPipeline", (16, 32), "draws images of its own size only"),
        ("StableDiffusion3Pipeline", (32, 128), "knows positions up to 64 pixels; got 128, expected at most 64"),
        ("StableDiffusion3Pipeline", (32, 36), "got 36, expected multiples of 8"),
        ("FluxPipeline", (32, 44), "got 44, expected multiples of 8"),
    ],
)
def test_ranges_that_a_family_cannot_draw_are_refused(
    family: str, sizes: tuple[int, ...], said: str, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of(family).model_copy(update={"shapes": Shapes(batch=(1, 2), size=sizes)})
    with pytest.raises(RecipeError, match=said):
        check_recipe(recipe, tmp_path / "out")
