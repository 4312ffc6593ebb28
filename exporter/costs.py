"""What one call of each network costs, from its shapes, and how fast this machine is, from a short test.

Networks are built without memory and called on the meta device, which tells operations and the widest tensors.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from exporter.lowering.wrappers import AutoencoderEncoder, Sizes, example_feeds, part_of, wrap
from exporter.networks.components import Component
from exporter.networks.replay import replay
from exporter.networks.storage import build_network, load_surgery

MIB = 2**20
FLOAT = 4
_TOKENS = 77  # of a text whose encoder does not say
_TEST_S, _LEAST_SHARE = 0.3, 0.1
_NUMBERS = list(range(10_000))
_FITTED_S = 0.00056  # what `_plain_work` took on the machine that the constants were fitted on


@dataclass(frozen=True)
class Network:
    """What one call of a component costs, and what its weights take.

    Attributes:
        flops: floating-point operations of a call with all of its rows.
        widest_mib: of the widest tensor between two layers.
        scores_mib: of the largest table of attention scores, which fused kernels never write down.
        kept_mib: of what all layers answer, which training keeps for the way back.
        weights: how many tensors its state dict has: what tracing and opening it cost goes with it.
        mib: in float32, of the part that its engine holds; `stored_mib` as the source stores that part.
        whole_mib: in float32, of the network that torch loads, both halves of an autoencoder.
        sample_mib: of one row of its first input, in float32; `given_mib` of one row of all the others.
    """

    flops: float
    widest_mib: float
    scores_mib: float
    kept_mib: float
    weights: int
    mib: float
    stored_mib: float
    whole_mib: float
    sample_mib: float
    given_mib: float


@dataclass(frozen=True)
class Machine:
    """How fast this machine is now.

    Attributes:
        flops: operations per second of one thread in a convolution.
        threads: of torch.
        cores: what runtimes use unless told otherwise.
        share: of the time that this process gets, where others work on the same cores.
        pace: seconds of Python's own work here over those on the machine that the constants were fitted on.
    """

    flops: float
    threads: int
    cores: int
    share: float
    pace: float


def cost_of(part: Component, source: Path, stored_bytes: int, rows: int, latent: int) -> Network:
    """Return what a component costs.

    Args:
        part: the component.
        source: folder of the pipeline.
        stored_bytes: of the weight files of its folder.
        rows: first axis of its inputs.
        latent: side of the latent.
    """
    folder = source / part.folder
    whole = build_network(folder, cls=part.cls)
    replay(whole, load_surgery(folder), place=str(folder))  # the source may be a state that was pruned
    nn.Module.to(whole, torch.device("meta"), torch.float32).eval()
    module = part_of(part, whole)
    seen = _text_cost(module, rows) if part.role == "text" else _traced_cost(module, rows, latent)
    held = _numbers(module)
    if part.role == "decoder":
        held -= _numbers(AutoencoderEncoder(whole))
    share = held / max(_numbers(whole), 1)
    return Network(
        flops=seen.flops,
        widest_mib=seen.widest * FLOAT / MIB,
        scores_mib=seen.scores * FLOAT / MIB,
        kept_mib=seen.kept * FLOAT / MIB,
        weights=round(len(module.state_dict()) * (share if part.role == "decoder" else 1)),
        mib=held * FLOAT / MIB,
        stored_mib=stored_bytes * share / MIB,
        whole_mib=_numbers(whole) * FLOAT / MIB,
        sample_mib=seen.sample * FLOAT / MIB,
        given_mib=seen.given * FLOAT / MIB,
    )


def machine() -> Machine:
    """Test this machine for about a third of a second."""
    with _one_thread():
        flops, share = _convolve()
    threads = torch.get_num_threads()
    took = min(_timed(_plain_work) for _ in range(15))
    return Machine(flops, threads, os.cpu_count() or 1, share, took / _FITTED_S)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass
class _Seen:
    """Operations, and elements of tensors."""

    flops: float = 0.0
    widest: int = 0
    scores: int = 0
    kept: int = 0
    sample: int = 0
    given: int = 0


class _Scores(TorchDispatchMode):
    """Notes how large a table of attention scores would be, were it written down."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at what a softmax answers, or at query and key of a kernel that keeps it to itself."""
        found = func(*args, **(kwargs or {}))
        if "softmax" in str(func):
            self._seen.scores = max(self._seen.scores, found.numel())
        elif "scaled_dot_product" in str(func):
            self._seen.scores = max(self._seen.scores, prod(args[0].shape[:-1]) * int(args[1].shape[-2]))
        return found


def _text_cost(module: nn.Module, rows: int) -> _Seen:
    """Return what a text encoder costs, by its layers: T5 reads its mask's values, which the meta device has not."""
    tokens = int(getattr(module.config, "max_position_embeddings", _TOKENS))
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    flops = 2.0 * rows * tokens * sum(layer.weight.numel() for layer in layers)
    widths = [layer.out_features for layer in layers]
    return _Seen(flops, rows * tokens * max(widths, default=0), 0, rows * tokens * sum(widths))


def _traced_cost(module: nn.Module, rows: int, latent: int) -> _Seen:
    seen = _Seen()

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.widest = max(seen.widest, output.numel())
            seen.kept += output.numel()

    hooks = [leaf.register_forward_hook(note) for leaf in module.modules() if not list(leaf.children())]
    feeds = example_feeds(module, Sizes(rows, latent, _TOKENS))
    with FlopCounterMode(display=False) as counter, _Scores(seen), torch.no_grad():
        wrap(module)(*feeds)
    for hook in hooks:
        hook.remove()
    seen.flops = float(counter.get_total_flops())
    seen.sample, *others = (feed.numel() // rows for feed in feeds)
    seen.given = sum(others)
    return seen


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other would make the test one of the other programs on this machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _convolve() -> tuple[float, float]:
    """Return operations per second in the best of many tries, and our share of the time over all of them."""
    image, weight = torch.zeros(2, 64, 32, 32), torch.zeros(64, 64, 3, 3)
    work, best = 2.0 * 2 * 64 * 64 * 9 * 32 * 32, float("inf")
    with torch.no_grad():
        torch.nn.functional.conv2d(image, weight, padding=1)
        begun, busy = time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - begun) < _TEST_S:
            best = min(best, _timed(lambda: torch.nn.functional.conv2d(image, weight, padding=1)))
    now = (time.process_time() - busy) / passed
    # A moment may fall into others' burst: over the last minute there may have been more to have.
    lately = (os.cpu_count() or 1) / (os.getloadavg()[0] + 1) if hasattr(os, "getloadavg") else now
    return work / best, min(max(now, lately, _LEAST_SHARE), 1.0)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _plain_work() -> None:
    """Work as Python's own is, in one call of compiled code: what watches ours, such as coverage, leaves it alone."""
    json.dumps(_NUMBERS)
