from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from exporter.errors import ComponentFailed
from exporter.metrics.features import Baseline, Verdicts, clip_score, judge_measurements, judge_rate, kid
from exporter.metrics.intervals import wilson
from exporter.metrics.place import Place

PLACE = Place("1-pruned", "ort")
PROMPTS = [f"prompt {index}" for index in range(40)]


class FakeJudge:
    """Scores by brightness; ranks first what is bright enough; features are channel statistics."""

    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        assert len(images) == len(prompts)
        return images.mean(axis=(1, 2, 3)) / 2.55

    def rates(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return self.scores(images, prompts) > 40

    def features(self, images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1, 3).astype(np.float64) / 255
        return np.concatenate([flat.mean(axis=1), flat.std(axis=1)], axis=1)


def images(seed: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    level = generator.uniform(60, 200, (40, 1, 1, 3)) + shift
    return np.clip(level + generator.normal(0, 20, (40, 8, 8, 3)), 0, 255).astype(np.uint8)


def verdicts(pictures: np.ndarray) -> Verdicts:
    return Verdicts.of(FakeJudge(), pictures, PROMPTS)


def test_a_cell_has_score_rate_and_kid_in_the_named_space() -> None:
    dense = Baseline("0-dense", verdicts(images(0)))
    found = {m.name: m for m in judge_measurements(verdicts(images(0, -20)), PLACE, space="fake", dense=dense)}
    assert set(found) == {"fidelity.clip_score", "fidelity.judge_rate", "fidelity.kid"}
    assert found["fidelity.clip_score"].detail["space"] == found["fidelity.kid"].detail["space"] == "fake"
    for name in ("fidelity.clip_score", "fidelity.judge_rate"):
        ratio = found[name].ratio
        assert ratio is not None
        assert ratio.to == "0-dense"
        assert ratio.pairs == 40
        assert ratio.low <= ratio.value <= ratio.high <= 1.0


def test_dense_itself_has_no_ratio_and_no_kid() -> None:
    found = {m.name: m for m in judge_measurements(verdicts(images(0)), PLACE, space="fake", dense=None)}
    assert found["fidelity.kid"].value is None
    assert found["fidelity.clip_score"].ratio is None
    assert found["fidelity.judge_rate"].ratio is None


def test_rate_has_the_wilson_interval() -> None:
    rates = np.arange(40) < 33
    found = judge_rate(rates, PLACE)
    assert found.value == 33 / 40
    assert (found.low, found.high) == wilson(33, 40)
    assert found.samples == 40


def test_ratio_is_paired() -> None:
    """The same prompts fail in both: the ratio is certain, although each rate alone is not."""
    dense = np.arange(200) % 4 != 0
    same = judge_rate(dense.copy(), PLACE, dense=("0-dense", dense)).ratio
    assert same is not None
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)
    other = np.roll(dense, 1)
    found = judge_rate(other, PLACE, dense=("0-dense", dense))
    assert found.ratio is not None
    assert found.ratio.value == 1.0
    assert found.ratio.low < 0.95 < 1.05 < found.ratio.high
    assert found.detail["lost_to_dense"] == found.detail["won_over_dense"] == 50


def test_paired_interval_is_close_to_the_log_normal_one() -> None:
    """Against the delta method for a ratio of paired rates."""
    generator = np.random.default_rng(0)
    dense = generator.random(2000) < 0.9
    cell = dense & (generator.random(2000) < 0.95)
    ratio = judge_rate(cell, PLACE, dense=("0-dense", dense)).ratio
    assert ratio is not None
    lost, kept = int((dense & ~cell).sum()), int((dense & cell).sum())
    spread = np.sqrt(lost / (kept * (kept + lost)))
    expected = [kept / (kept + lost) * np.exp(sign * 1.96 * spread) for sign in (-1, 1)]
    assert [ratio.low, ratio.high] == pytest.approx(expected, abs=2e-3)


def test_no_ratio_to_a_dense_that_is_never_right() -> None:
    found = judge_rate(np.arange(10) < 5, PLACE, dense=("0-dense", np.zeros(10, bool)))
    assert found.ratio is None
    assert "no ratio, because dense has none right" in found.note


def test_ratio_survives_a_dense_that_is_rarely_right() -> None:
    dense = np.arange(10) < 1
    ratio = judge_rate(np.arange(10) < 2, PLACE, dense=("0-dense", dense)).ratio
    assert ratio is not None
    assert np.isfinite([ratio.low, ratio.high]).all()


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all:UserWarning")  # advice, no fault
def test_kid_is_torchmetrics() -> None:
    """With one subset that holds all images, torchmetrics' metric is the same estimate."""
    generator = np.random.default_rng(0)
    real, drawn = generator.normal(size=(30, 16)), generator.normal(0.3, 1.2, size=(30, 16))
    features = {0.0: real, 1.0: drawn}

    class Lookup(torch.nn.Module):
        """A feature extractor that finds the prepared features by the first pixel of each image."""

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(features[float(pictures[0, 0, 0, 0] > 0)][: len(pictures)])

    reference = KernelInceptionDistance(feature=Lookup(), subsets=3, subset_size=30, normalize=True)
    reference.update(torch.zeros(30, 3, 4, 4), real=True)
    reference.update(torch.ones(30, 3, 4, 4), real=False)
    expected, _ = reference.compute()
    found = kid(drawn, real, PLACE, space="test")
    assert found.value == pytest.approx(float(expected), abs=1e-4)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high


def test_kid_by_its_definition() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(9, 4)), generator.normal(size=(9, 4))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    across = 2 * sum(kernel(a, b) for a in x for b in y) / 81
    assert kid(y, x, PLACE, space="test").value == pytest.approx(within - across)


def test_kid_interval_has_the_spread_of_repeated_draws() -> None:
    generator = np.random.default_rng(2)
    values, widths = [], []
    for _ in range(30):
        found = kid(generator.normal(0.5, 1, (64, 8)), generator.normal(size=(64, 8)), PLACE, space="test")
        assert found.value is not None
        assert found.high is not None
        values.append(found.value)
        widths.append((found.high - found.value) / 1.96)
    assert 0.6 < np.mean(widths) / np.std(values) < 1.6


def test_kid_of_few_images_is_not_measured() -> None:
    found = kid(np.zeros((7, 3)), np.zeros((7, 3)), PLACE, space="test")
    assert found.value is None
    assert "set measure.images to 8 or more" in found.note


def test_pairs_must_match_and_be_finite() -> None:
    scores = np.ones(4)
    with pytest.raises(ComponentFailed, match="counts differ"):
        clip_score(scores, PLACE, space="s", dense=("0-dense", np.ones(5)))
    with pytest.raises(ComponentFailed, match="1 of 4 NaN"):
        clip_score(np.array([1, 2, np.nan, 3]), PLACE, space="s")
    with pytest.raises(ComponentFailed, match="values of 0-dense"):
        clip_score(scores, PLACE, space="s", dense=("0-dense", scores * np.nan))
    with pytest.raises(ComponentFailed, match="features in s: shapes differ"):
        kid(np.zeros((9, 3)), np.zeros((8, 3)), PLACE, space="s")
    with pytest.raises(ComponentFailed, match="reference features in s"):
        kid(np.zeros((9, 3)), np.full((9, 3), np.inf), PLACE, space="s")


def test_a_judge_must_answer_once_per_image() -> None:
    class Short(FakeJudge):
        def rates(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
            return np.ones(1, bool)

    with pytest.raises(ComponentFailed, match="judge: wrong shapes"):
        Verdicts.of(Short(), images(0), PROMPTS)
