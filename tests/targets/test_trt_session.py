"""A session of TensorRT with a library and a driver of a few lines: its own part, up to closing and refusing."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import targets.trt_session
from targets.base import Sparse, TargetError
from targets.trt_build import PLAN, Order, Told
from targets.trt_session import CudaSession


class Mode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class Kind(enum.Enum):
    FLOAT = np.float32
    BF16 = None


class Driver:
    """Answers every call with success, and an address."""

    def __getattr__(self, name: str) -> Callable[..., tuple[int, int]]:
        return lambda *given: (0, 1)


class Engine:
    """Of a network from x to y that has one layer; also its own context and inspector."""

    num_io_tensors = 2
    profiler = None

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Kind:
        return self.kind

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (2, 3)

    def create_execution_context(self) -> Engine:
        return self

    create_engine_inspector = create_execution_context

    def get_engine_information(self, form: str) -> str:
        return json.dumps({"Layers": [{"Name": "only", "LayerType": "gemm"}]})

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.profiler is not None:
            self.profiler.report_layer_time("only", 0.5)
        return True


class Library:
    """As much of the module as a session uses."""

    TensorIOMode = Mode
    ILogger = IProfiler = type("Base", (), {})
    LayerInformationFormat = type("LayerInformationFormat", (), {"JSON": "json"})
    kind: Kind | None = Kind.FLOAT

    def Runtime(self, logger: object) -> Library:  # noqa: N802 - the library's name
        if self.kind is None:
            raise TypeError("factory function returned nullptr")
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Engine:
        assert self.kind is not None
        return Engine(self.kind)

    def nptype(self, kind: Kind) -> type:
        if kind.value is None:
            raise TypeError("could not resolve")
        return kind.value


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Kind | None], CudaSession]:
    monkeypatch.setattr(targets.trt_session, "require", lambda module, place, install: Driver())
    Told("TensorRT 10.16", "card (8.9)", Order(), Sparse(None, None), ()).save(tmp_path)
    (tmp_path / PLAN).write_bytes(b"")

    def open_with(kind: Kind | None) -> CudaSession:
        library = Library()
        library.kind = kind
        return CudaSession(library, tmp_path, "card (8.9)", "here")

    return open_with


def test_layers_have_the_time_of_one_call(opened: Callable[[Kind | None], CudaSession]) -> None:
    session = opened(Kind.FLOAT)
    feeds = {"x": np.zeros((2, 3), np.float32)}
    assert session(feeds)["y"].shape == (2, 3)
    (timed,) = session.profile(feeds, 4)
    assert (timed.layer.name, timed.ms) == ("only", 0.5)
    session(feeds)  # no longer profiled
    assert session.profile(feeds, 1)[0].ms == 0.5


def test_a_closed_session_refuses_every_call(opened: Callable[[Kind | None], CudaSession]) -> None:
    session = opened(Kind.FLOAT)
    feeds = {"x": np.zeros((2, 3), np.float32)}
    session.close()
    session.close()
    for call in (lambda: session(feeds), session.evidence, lambda: session.profile(feeds, 1)):
        with pytest.raises(TargetError, match=r"the session is closed\. Open the engine again\."):
            call()


def test_an_end_of_a_type_that_numpy_has_not_is_refused(opened: Callable[[Kind | None], CudaSession]) -> None:
    with pytest.raises(TargetError, match=r"'x' cannot be fed or fetched; got BF16, expected .* Export the graph"):
        opened(Kind.BF16)


def test_a_runtime_that_does_not_start_is_refused(opened: Callable[[Kind | None], CudaSession]) -> None:
    with pytest.raises(TargetError, match="here: its runtime does not start: factory function returned nullptr"):
        opened(None)
