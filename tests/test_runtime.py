"""Engines behind diffusers' own pipeline: batches of any size on engines of a fixed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter.errors import ComponentFailed
from exporter.runtime import Decoder, Denoiser, TextEncoder
from exporter.sessions import run_batched
from targets.base import Evidence, TensorSpec, check_feeds


class Doubling:
    """A session of fixed batch 4 that doubles its sample and adds the timestep; it refuses any other shape."""

    inputs = (TensorSpec("sample", "float32", (4, 2)), TensorSpec("timestep", "float32", ()))
    outputs = (TensorSpec("out_sample", "float32", (4, 2)),)

    def __init__(self) -> None:
        self.calls = 0
        self._answer = np.empty((4, 2), np.float32)

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        check_feeds(self.inputs, feeds, "test")
        self.calls += 1
        self._answer[:] = feeds["sample"] * 2 + feeds["timestep"]
        return {"out_sample": self._answer}  # the same memory each time, as some runtimes do

    def evidence(self) -> Evidence:
        raise AssertionError

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("rows", "calls"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (11, 3)])
def test_any_number_of_rows_runs_on_a_fixed_batch(rows: int, calls: int) -> None:
    session = Doubling()
    sample = np.arange(rows * 2, dtype=np.float64).reshape(rows, 2)
    found = run_batched(session, {"sample": sample, "timestep": np.array(3)})
    assert np.array_equal(found["out_sample"], sample.astype(np.float32) * 2 + 3)
    assert session.calls == calls


def test_answers_stay_what_they_were_after_the_next_call() -> None:
    session = Doubling()
    one = run_batched(session, {"sample": np.ones((4, 2)), "timestep": np.array(0)})["out_sample"]
    run_batched(session, {"sample": np.zeros((4, 2)), "timestep": np.array(0)})
    assert np.array_equal(one, np.full((4, 2), 2, np.float32))


class Echo:
    """A session that answers with what it was fed, under the names of a component."""

    def __init__(self, names: dict[str, str], inputs: tuple[TensorSpec, ...]) -> None:
        self.inputs, self.outputs, self._names = inputs, (), names
        self.fed: dict[str, NDArray[Any]] = {}

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        check_feeds(self.inputs, feeds, "test")
        self.fed = dict(feeds)
        return {output: feeds[source] for output, source in self._names.items()}

    def evidence(self) -> Evidence:
        raise AssertionError

    def close(self) -> None:
        pass


def test_the_denoiser_takes_what_pipelines_pass() -> None:
    specs = (
        TensorSpec("sample", "float32", (2, 1, 2, 2)),
        TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", "float32", (2, 3, 4)),
    )
    session = Echo({"out_sample": "sample"}, specs)
    module = Denoiser(session, {"in_channels": 1}, ("sample", "timestep", "encoder_hidden_states"))
    text = torch.ones(2, 3, 4)
    (answer,) = module(
        torch.ones(2, 1, 2, 2), torch.tensor(981), encoder_hidden_states=text, return_dict=False, timestep_cond=None
    )
    assert torch.equal(answer, torch.ones(2, 1, 2, 2))
    assert session.fed["timestep"].tolist() == 981.0
    assert module.config.in_channels == 1
    assert module.dtype == torch.float32


def test_decoder_and_text_encoder_answer_as_diffusers_expects() -> None:
    decoder = Decoder(
        Echo({"sample": "latent_sample"}, (TensorSpec("latent_sample", "float32", (1, 1)),)), {}, ("latent_sample",)
    )
    assert torch.equal(decoder.decode(torch.ones(1, 1), return_dict=False)[0], torch.ones(1, 1))
    names = {"last_hidden_state": "input_ids", "pooler_output": "input_ids"}
    text = TextEncoder(Echo(names, (TensorSpec("input_ids", "int64", (1, 2)),)), {}, ("input_ids",))
    assert torch.equal(text(torch.tensor([[1, 2]]), attention_mask=None)[0], torch.tensor([[1, 2]]))


def test_a_vae_without_its_encoder_says_how_to_get_it() -> None:
    decoder = Decoder(Echo({}, ()), {}, ("latent_sample",))
    with pytest.raises(ComponentFailed, match=r"vae_encoder: not compiled.*export: \{vae_encoder: true\}"):
        decoder.encode(torch.zeros(1, 3, 8, 8))
