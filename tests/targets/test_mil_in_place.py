"""Softmax of large tables over the tables themselves: the same values, and only where nobody else needs these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil_programs import library, save_program

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")

from targets.mil import in_place
from targets.mil.evaluator import Evaluator

FEEDS = {name: np.random.default_rng(index).standard_normal((2, 3, 8, 4)) for index, name in enumerate(("q", "k", "v"))}
Build = Callable[[Any, Any], Sequence[Any]]


def _scores(b: Any, x: Any) -> Any:
    return b.matmul(x=x["q"], y=x["k"], transpose_y=True)


def attention(b: Any, x: Any) -> list[Any]:
    return [b.matmul(x=b.softmax(x=_scores(b, x), axis=-1), y=x["v"])]


def scores_are_needed_later(b: Any, x: Any) -> list[Any]:
    scores = _scores(b, x)
    return [b.add(x=b.softmax(x=scores, axis=-1), y=scores)]


def scores_are_an_answer(b: Any, x: Any) -> list[Any]:
    scores = _scores(b, x)
    return [b.softmax(x=scores, axis=3), scores]


def scores_live_on_in_another_shape(b: Any, x: Any) -> list[Any]:
    scores = _scores(b, x)
    flat = b.reshape(x=scores, shape=(6, 64))
    return [b.reshape(x=b.softmax(x=scores, axis=-1), shape=(6, 64)), b.relu(x=flat)]


def along_another_axis(b: Any, x: Any) -> list[Any]:
    return [b.softmax(x=_scores(b, x), axis=1)]


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize(
    ("build", "over"),
    [
        (attention, True),
        (scores_are_needed_later, False),
        (scores_are_an_answer, False),
        (scores_live_on_in_another_shape, False),
        (along_another_axis, False),
    ],
)
def test_answers_are_the_same_bit_by_bit(
    build: Build, over: bool, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    feeds = {name: array.astype(np.float32) for name, array in FEEDS.items()}

    def built(b: Any, x: Any) -> Sequence[Any]:
        if not half:
            return build(b, x)
        narrow = {name: b.cast(x=value, dtype="fp16") for name, value in x.items()}
        return [b.cast(x=item, dtype="fp32") for item in build(b, narrow)]

    path = save_program(tmp_path / "m.mlpackage", feeds, built)
    wanted = Evaluator(path)(feeds)
    monkeypatch.setattr(in_place, "_LARGE", 1)
    done, found = [], in_place.softmax_in_place

    def told(*given: Any) -> Any:
        table = found(*given)
        done.append(table is not None)
        return table

    monkeypatch.setattr("targets.mil.evaluator.softmax_in_place", told)
    evaluator = Evaluator(path)
    for _again in range(2):
        got = evaluator(feeds)
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert any(done) == over
