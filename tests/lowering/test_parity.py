"""Parity is enforced: a component that answers differently, with NaN, or in another shape fails with its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from exporter.errors import ComponentFailed
from exporter.lowering.export import ExportOptions, export_component
from exporter.lowering.parity import LIMITS, Limits, check_parity
from targets.base import Evidence, TargetError, TensorSpec

TIMESTEPS = (999.0, 500.0, 1.5)


class AutoencoderKL(nn.Module):
    """The least that can stand where a VAE is expected: one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = FrozenDict({"latent_channels": 4})
        self.layer = nn.Conv2d(4, 3, 1)

    def decode(self, latents: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        return (self.layer(latents),)


class UNet2DConditionModel(nn.Module):
    """Answers the sample scaled by the timestep, plus the mean of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor]:
        return (self.scale * sample * timestep / 1000 + encoder_hidden_states.mean(),)


class Pretended:
    """A session that answers as the denoiser does, with `change` applied at one timestep."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, change: Any, at: float) -> None:
        self.change, self.at = change, at

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer = 2 * feeds["sample"] * feeds["timestep"] / 1000 + feeds["encoder_hidden_states"].mean()
        answer = answer.astype(np.float32)
        return {"out_sample": self.change(answer) if feeds["timestep"] == np.float32(self.at) else answer}

    def evidence(self) -> Evidence:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to free."""


def calls() -> list[tuple[float | None, dict[str, np.ndarray]]]:
    values = np.random.default_rng(0)
    return [
        (
            timestep,
            {
                "sample": values.standard_normal((2, 4, 8, 8), dtype=np.float32),
                "timestep": np.array(timestep, np.float32),
                "encoder_hidden_states": values.standard_normal((2, 6, 5), dtype=np.float32),
            },
        )
        for timestep in TIMESTEPS
    ]


def spoil(value: float) -> Any:
    def change(answer: np.ndarray) -> np.ndarray:
        answer = answer.copy()
        answer[0, 0, 0, 0] = value
        return answer

    return change


def test_a_sound_engine_passes_with_numbers_for_every_timestep() -> None:
    found = check_parity("unet", UNet2DConditionModel(), Pretended(np.copy, 500.0), calls())
    assert [entry["timestep"] for entry in found["calls"]] == list(TIMESTEPS)
    assert {entry["output"] for entry in found["calls"]} == {"out_sample"}
    assert found["psnr_db"] == min(entry["psnr_db"] for entry in found["calls"]) > 100
    assert found["max_error"] == max(entry["max_error"] for entry in found["calls"]) < 1e-5
    assert found["limits"] == {"psnr_db": 70.0, "max_error": 2e-3}


def test_psnr_and_error_are_what_their_names_say() -> None:
    shift = 0.01
    loose = Limits(psnr_db=0, max_error=1)
    found = check_parity(
        "unet", UNet2DConditionModel(), Pretended(lambda answer: answer + shift, 500.0), calls(), loose
    )
    answers = [Pretended(np.copy, 0)(feeds)["out_sample"] for _, feeds in calls()]
    peak = max(answer.max() for answer in answers) - min(answer.min() for answer in answers)
    entry = found["calls"][1]
    assert entry["psnr_db"] == pytest.approx(20 * np.log10(peak / shift), abs=0.01)
    assert entry["max_error"] == pytest.approx(shift / peak, rel=1e-3)


@pytest.mark.parametrize("at", TIMESTEPS)
def test_a_miss_names_component_timestep_got_and_limit(at: float) -> None:
    spoiled = Pretended(lambda answer: answer + 0.1, at)
    pattern = (
        rf"^unet at timestep {re.escape(f'{at:g}')}: out_sample differs from torch; got \d+\.\d dB .*at least 70 dB"
    )
    with pytest.raises(ComponentFailed, match=pattern):
        check_parity("unet", UNet2DConditionModel(), spoiled, calls())


def test_one_wrong_value_is_enough() -> None:
    loose = Limits(psnr_db=0, max_error=2e-3)
    with pytest.raises(ComponentFailed, match="largest error of 0"):
        check_parity(
            "unet",
            UNet2DConditionModel(),
            Pretended(lambda a: spoil(float(a[0, 0, 0, 0]) + 0.1)(a), 1.5),
            calls(),
            loose,
        )


@pytest.mark.parametrize(("value", "words"), [(np.nan, "1 NaN and 0 infinite"), (np.inf, "0 NaN and 1 infinite")])
def test_answers_that_are_not_finite_fail_whatever_the_limits(value: float, words: str) -> None:
    loose = Limits(psnr_db=-1000, max_error=1e9)
    with pytest.raises(ComponentFailed, match=rf"unet at timestep 500: out_sample: not finite; got {words} of 512"):
        check_parity("unet", UNet2DConditionModel(), Pretended(spoil(value), 500.0), calls(), loose)


def test_a_broken_network_is_not_blamed_on_the_engine() -> None:
    module = UNet2DConditionModel()
    with torch.no_grad():
        module.scale.fill_(torch.inf)
    with pytest.raises(ComponentFailed, match="torch's own answer is not finite"):
        check_parity("unet", module, Pretended(np.copy, 500.0), calls())


def test_another_shape_or_no_answer_fails() -> None:
    with pytest.raises(ComponentFailed, match=r"got \(1, 4, 8, 8\), expected \(2, 4, 8, 8\)"):
        check_parity("unet", UNet2DConditionModel(), Pretended(lambda answer: answer[:1], 500.0), calls())
    with pytest.raises(ComponentFailed, match="no recorded calls"):
        check_parity("unet", UNet2DConditionModel(), Pretended(np.copy, 500.0), [])


def test_a_failing_runtime_is_the_components_failure() -> None:
    def fail(_: np.ndarray) -> np.ndarray:
        raise TargetError("out of memory")

    with pytest.raises(ComponentFailed, match="unet: parity: out of memory"):
        check_parity("unet", UNet2DConditionModel(), Pretended(fail, 500.0), calls())


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export's own
def test_an_onnx_file_is_run(tmp_path: Path) -> None:
    module = AutoencoderKL()
    export_component("vae_decoder", module, tmp_path, ExportOptions(latent=8))
    feeds = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)}
    found = check_parity("vae_decoder", module, tmp_path / "model.onnx", [(None, feeds)])
    assert found["psnr_db"] > 100
    assert found["calls"][0]["timestep"] is None
    with torch.no_grad():
        module.layer.bias[0] += 0.1
    with pytest.raises(ComponentFailed, match=r"^vae_decoder: sample differs from torch"):
        check_parity("vae_decoder", module, tmp_path / "model.onnx", [(None, feeds)])
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ComponentFailed, match=r"vae_decoder: parity: .*model\.onnx"):
        check_parity("vae_decoder", module, tmp_path / "model.onnx", [(None, feeds)])


def test_limits_loosen_with_the_precision() -> None:
    assert LIMITS["f32"].psnr_db > LIMITS["f16"].psnr_db > LIMITS["bf16"].psnr_db
    assert LIMITS["f32"].max_error < LIMITS["f16"].max_error < LIMITS["bf16"].max_error
