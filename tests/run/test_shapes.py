"""Open shapes: engines take the whole range, every named point is timed, and the cost against fixed ones is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exporter
from exporter.errors import RecipeError
from exporter.preflight import check_recipe
from exporter.progress import Silent
from exporter.run import run_recipe
from exporter.shapes import Point, feeds_at
from targets.base import TensorSpec

SHAPES = {"batch": [1, 3], "size": [64, 128]}
TARGETS = {"ort": {"type": "onnxruntime", "threads": 1}, "ov": {"type": "openvino", "threads": 1}}


@pytest.mark.slow
def test_engines_accept_the_range_and_the_report_says_what_it_costs(tiny_recipe: Any, tmp_path: Path) -> None:
    record = run_recipe(tiny_recipe(stages=[], shapes=SHAPES, targets=TARGETS), tmp_path / "out", progress=Silent())
    assert record.exit_code == 0, [cell.error for cell in record.cells]
    for cell in record.cells:
        found = {(m.name, m.component): m for m in cell.measurements}
        for component in ("unet", "vae_decoder", "text_encoder"):
            points = found["latency.shapes_ms", component].detail["points"]
            assert [(row["batch"], row["size"]) for row in points] == [(1, 64), (1, 128), (3, 64), (3, 128)]
            assert found["latency.shapes_ms", component].value == max(row["median_ms"] for row in points)
        cost = found["latency.shapes_cost", "unet"]
        assert cost.ratio is not None
        assert cost.ratio.to == "fixed shapes"
        assert cost.value is not None
        assert 0.2 < cost.value < 5
        assert "with open shapes" in cost.note
        assert cell.engine is not None
        pipeline = exporter.load(tmp_path / "out" / cell.engine)
        for size, count in ((64, 1), (128, 3)):
            images = pipeline(["a cat"] * count, height=size, width=size, num_inference_steps=2).images
            assert [image.size for image in images] == [(size, size)] * count


def test_fixed_stays_the_default(finished: Path, tiny_recipe: Any) -> None:
    assert tiny_recipe().shapes is None
    pipeline = exporter.load(finished / "engines" / "0-dense" / "ort")
    with pytest.raises(Exception, match="wrong shape"):
        pipeline("a cat", height=128, width=128, num_inference_steps=2)


def test_inputs_grow_along_open_axes_only() -> None:
    feeds = {"sample": np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2), "timestep": np.array(1.0, np.float32)}
    inputs = (TensorSpec("sample", "float32", (-1, 2, -1, -1)), TensorSpec("timestep", "float32", ()))
    found = feeds_at(feeds, inputs, Point(3, 32), {"batch": 1, "size": 16})
    assert found["sample"].shape == (6, 2, 4, 4)
    np.testing.assert_array_equal(found["sample"][:2, :, :2, :2], feeds["sample"])
    np.testing.assert_array_equal(found["sample"][2:4], found["sample"][:2])
    assert found["timestep"].shape == ()
    assert feeds_at(feeds, inputs, Point(1, 8), {"batch": 1, "size": 16})["sample"].shape == (2, 2, 1, 1)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"batch": [4, 1]}, "expected rising numbers"),
        ({"batch": []}, "expected at least one"),
        ({"batch": [3, 4]}, "expected a range that holds sampling.batch, 2"),
        ({"batch": [1, 4], "sizes": [64]}, "did you mean 'size'|size"),
        ({"batch": [1, 4], "size": [64, 72]}, "shapes.size: got 72, expected multiples of 16"),
        ({"batch": [1, 4], "size": [128, 256]}, "expected a range that holds the source's own size, 64"),
    ],
)
def test_ranges_that_cannot_be_are_refused(tiny_recipe: Any, tmp_path: Path, shapes: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_recipe(tiny_recipe(shapes=shapes), tmp_path / "out")
