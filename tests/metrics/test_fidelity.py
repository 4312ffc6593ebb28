from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from exporter.errors import ComponentFailed
from exporter.metrics.fidelity import (
    Answers,
    Subset,
    ask,
    compare,
    component_fidelity,
    lowering,
    psnr_from_mse,
    recorded_answers,
    teacher_forced,
)
from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place

PLACE = Place("1-pruned", "openvino", "unet")
TIMESTEPS = (900.0, 500.0, 41.0)


def network(sample: np.ndarray, timestep: float, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """A denoiser that depends on all of its inputs, row by row."""
    return np.tanh(sample * 0.5 + given["text"].mean(axis=(1, 2))[:, None, None, None] + timestep / 1000).astype(
        np.float32
    )


@dataclass(frozen=True)
class FakeCall:
    timestep: float
    sample: np.ndarray
    given: dict[str, np.ndarray]
    given_uncond: dict[str, np.ndarray] | None
    cond: np.ndarray
    uncond: np.ndarray | None
    guided: np.ndarray


class FakeRecording:
    """A recording of `network` for five prompts."""

    def __init__(self, guidance: float = 4.0) -> None:
        generator = np.random.default_rng(0)
        self.guidance, self.count, self.timesteps = guidance, 5, TIMESTEPS
        self._samples = generator.normal(size=(3, 5, 4, 6, 6)).astype(np.float32)
        self._text = generator.normal(size=(5, 7, 8)).astype(np.float32)
        self._empty = np.broadcast_to(generator.normal(size=(1, 7, 8)), (5, 7, 8)).astype(np.float32)

    def calls(self, step: int, start: int = 0, stop: int | None = None) -> FakeCall:
        rows = slice(start, stop)
        sample, text, empty = self._samples[step, rows], {"text": self._text[rows]}, {"text": self._empty[rows]}
        cond = network(sample, TIMESTEPS[step], text)
        if self.guidance <= 1:
            return FakeCall(TIMESTEPS[step], sample, text, None, cond, None, cond)
        uncond = network(sample, TIMESTEPS[step], empty)
        guided = uncond + np.float32(self.guidance) * (cond - uncond)
        return FakeCall(TIMESTEPS[step], sample, text, empty, cond, uncond, guided)


def noisy(sigma: dict[float, float]) -> object:
    """The network with noise of its own size at each timestep."""
    generator = np.random.default_rng(5)

    def answer(sample: np.ndarray, timestep: float, given: Mapping[str, np.ndarray]) -> np.ndarray:
        exact = network(sample, timestep, given)
        return exact + generator.normal(scale=sigma[timestep], size=exact.shape).astype(np.float32)

    return answer


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("batch", [None, 1, 2, 5])
def test_the_same_denoiser_gives_the_recorded_answers(guidance: float, batch: int | None) -> None:
    recording = FakeRecording(guidance)
    got = ask(recording, network, Subset(batch=batch))
    reference = recorded_answers(recording)
    assert np.array_equal(got.guided, reference.guided)
    assert np.array_equal(got.raw, reference.raw)
    found = teacher_forced(reference, got, PLACE)
    assert found.value == 200.0
    assert "equal answers count as 200 dB" in found.note
    assert found.detail["cosine"] == pytest.approx(1.0)
    assert found.detail["max_error"] == 0.0


def test_every_call_has_the_rows_a_fixed_engine_takes() -> None:
    seen = []

    def answer(sample: np.ndarray, timestep: float, given: Mapping[str, np.ndarray]) -> np.ndarray:
        text = given["text"]
        seen.append((sample.shape, text.shape, sample.dtype, sample.flags.c_contiguous, text.flags.c_contiguous))
        return network(sample, timestep, given)

    ask(FakeRecording(), answer, Subset(prompts=3, steps=(0, 2), batch=2))
    assert seen == [((4, 4, 6, 6), (4, 7, 8), np.float32, True, True)] * 4


def test_worst_timestep_prompt_and_torchmetrics_value() -> None:
    recording = FakeRecording()
    reference = recorded_answers(recording)
    got = ask(recording, noisy({900.0: 0.01, 500.0: 0.002, 41.0: 0.05}), Subset())  # type: ignore[arg-type]
    found = teacher_forced(reference, got, PLACE)
    peak = float(reference.guided.max() - reference.guided.min())
    expected = [
        float(peak_signal_noise_ratio(torch.from_numpy(b), torch.from_numpy(a), data_range=peak))
        for a, b in zip(reference.guided, got.guided, strict=True)
    ]
    assert [db for _, db in found.detail["curve"]] == pytest.approx(expected, abs=1e-4)
    assert [t for t, _ in found.detail["curve"]] == list(TIMESTEPS)
    assert found.value == pytest.approx(min(expected), abs=1e-4)
    assert found.timestep == 41.0
    assert found.detail["mean"] == pytest.approx(sum(expected) / 3, abs=1e-4)
    assert found.detail["max_error"] == pytest.approx(np.abs(reference.guided - got.guided).max())
    assert found.samples == 15
    assert (found.name, found.unit, found.component) == ("fidelity.teacher_forced.psnr_db", "dB", "unet")
    assert Measurement.model_validate_json(found.model_dump_json()) == found


def test_cosine_is_torchs() -> None:
    generator = np.random.default_rng(0)
    reference, got = generator.normal(size=(2, 2, 3, 4, 4)), generator.normal(size=(2, 2, 3, 4, 4))
    found = compare(reference, got)
    expected = torch.nn.functional.cosine_similarity(
        torch.from_numpy(reference).flatten(1), torch.from_numpy(got).flatten(1)
    )
    assert found.cosine == pytest.approx(expected.tolist())


def test_worst_prompt_is_found() -> None:
    recording = FakeRecording()
    reference = recorded_answers(recording)
    guided, raw = reference.guided.copy(), reference.raw.copy()
    guided[1, 3] += 0.5
    raw[1, 5 + 3] += 0.5  # rows 5 to 9 are those with the prompt
    got = Answers(TIMESTEPS, guided, raw)
    found = teacher_forced(reference, got, PLACE)
    assert (found.timestep, found.detail["worst_prompt"]) == (500.0, 3)
    assert lowering(reference, got, PLACE)[0].detail["worst_prompt"] == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_finite_are_the_worst_and_stay_json(value: float) -> None:
    recording = FakeRecording()
    reference = recorded_answers(recording)
    guided, raw = reference.guided.copy(), reference.raw.copy()
    guided[1, 2, 0, 0, 0] = raw[1, 2, 0, 0, 0] = value
    got = Answers(TIMESTEPS, guided, raw)
    found = teacher_forced(reference, got, PLACE)
    assert (found.value, found.timestep, found.detail["worst_prompt"]) == (-200.0, 500.0, 2)
    assert "1 values are NaN or Inf, the first at timestep 500" in found.note
    psnr, error = lowering(reference, got, PLACE)
    assert psnr.value == -200.0
    assert error.value is not None
    assert error.value > 1e300
    for measurement in (found, psnr, error):
        json.loads(measurement.model_dump_json())
        json.dumps(measurement.detail, allow_nan=False)


def test_lowering_compares_before_guidance() -> None:
    """Guidance multiplies an engine's error; what export and compile did is seen without it."""
    recording = FakeRecording()
    reference = recorded_answers(recording)
    raw = reference.raw.copy()
    raw[2, 1, 0, 0, 0] += 0.25
    psnr, error = lowering(reference, Answers(TIMESTEPS, reference.guided, raw), PLACE)
    assert error.value == pytest.approx(0.25)
    assert error.timestep == psnr.timestep == 41.0
    peak = float(reference.raw.max() - reference.raw.min())
    assert psnr.value == pytest.approx(10 * math.log10(peak**2 / (0.25**2 / raw[2].size)), abs=1e-4)
    assert error.detail["curve"][2] == [41.0, pytest.approx(0.25)]


def test_components_without_timesteps() -> None:
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(4, 3, 8, 8)).astype(np.float32)
    got = reference + np.float32(0.01)
    found = component_fidelity(reference, got, Place("0-dense", "ort", "vae_decoder"))
    peak = float(reference.max() - reference.min())
    assert found.value == pytest.approx(20 * math.log10(peak / 0.01), abs=1e-2)
    assert found.timestep is None
    assert found.detail["curve"] == []
    assert found.samples == 4
    psnr, error = lowering(reference, got, PLACE)
    assert psnr.value == found.value
    assert error.value == pytest.approx(0.01, rel=1e-3)


def test_wrong_shape_is_a_failure_of_the_component() -> None:
    with pytest.raises(ComponentFailed, match=r"denoiser at timestep 900: wrong shape .* got \(10, 4, 6, 5\)"):
        ask(FakeRecording(), lambda sample, timestep, given: sample[..., 1:])
    with pytest.raises(ComponentFailed, match="shapes differ"):
        compare(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)))


@pytest.mark.parametrize("reference", [np.ones((1, 2, 3)), np.full((1, 2, 3), np.nan), np.array([[[0.0, np.inf]]])])
def test_unusable_reference_is_told(reference: np.ndarray) -> None:
    with pytest.raises(ComponentFailed, match="unusable reference"):
        compare(reference, np.zeros_like(reference))


def test_psnr_is_bounded_both_ways() -> None:
    assert psnr_from_mse(0.0, 1.0) == 200.0
    assert psnr_from_mse(1e-300, 1.0) == 200.0
    assert psnr_from_mse(1e300, 1.0) == -200.0
    assert psnr_from_mse(1.0, 1.0) == 0.0


def test_all_zero_answer_has_no_direction() -> None:
    reference = np.array([[[1.0, -1.0]]])
    assert compare(reference, np.zeros_like(reference)).cosine == (0.0,)
