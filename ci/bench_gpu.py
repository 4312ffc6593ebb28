"""Measures on the NVIDIA GPU that is here what weights with two zeros in four (2:4) gain: per layer, and a whole step.

``python ci/bench_gpu.py OUT`` times every distinct linear layer of the U-Nets of SD 1.5 and SDXL and of a block of
Flux's size, dense against PyTorch's semi-structured form, in fp16, bf16 and int8; then whole calls of these networks at
random weights with all linear layers that can be 2:4. It writes ``gpu.json`` and ``gpu.md`` into OUT. Exit 4, with the
reason, where torch has no GPU: nothing is estimated. ``--only`` takes some of the networks, ``--steps`` some of
``layers,whole``.

How it is taken: each variant is recorded as a CUDA graph (a layer as many products, so that launching costs nothing),
and dense and sparse are replayed pair by pair in alternating order between two events of the device, after a warm-up
until their times settle. A layer's weights stay in the GPU's cache over the products of one graph, for both alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from gpu_networks import NETWORKS, Linear, built, eligible_share, inputs_of, linear_layers
from gpu_table import table_of
from torch import Tensor, nn

from exporter.metrics.latency import Timer
from exporter.networks.sparsity import pattern_mask
from exporter.random_weights.filling import Fill, fills_of
from targets.semi_structured import refusal, semi_structured
from targets.torch_functions import semi_structured_linear
from targets.torch_session import event, exact, recorded

FORMAT = 1
PATTERN = (2, 4)
PRODUCTS = 20
"""Of a layer in one recording."""
KINDS = MappingProxyType({"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8})
NEAR = 0.02
"""Share of the largest answer that a 16-bit product may be off: its two kernels add up in different orders."""
INT8_ROWS, INT8_MULTIPLE = 17, 32
"""Least rows of `torch._int_mm` on a GPU, and what both sides of an 8-bit weight are multiples of for cuSPARSELt."""
Product = Callable[[], Tensor]
Calls = tuple[Product, Product, Callable[[], Product] | None]
FAILURES = (RuntimeError, NotImplementedError, ValueError, AttributeError)


@dataclass
class DeviceClock:
    """Nanoseconds that passed on the GPU inside of the calls that are timed, and no others.

    Attributes:
        events: makes an event of the device.
        now: so far.
    """

    events: Callable[[], Any] = event
    now: int = field(default=0, init=False)

    def read(self) -> int:
        """Return the time, as `Timer` asks for it."""
        return self.now

    def timed(self, call: Callable[[], object]) -> Callable[[], None]:
        """Return a call that waits for the device and lets the clock go on by what it took there."""
        first, last = self.events(), self.events()

        def run() -> None:
            first.record()
            call()
            last.record()
            last.synchronize()
            self.now += round(1e6 * first.elapsed_time(last))

        return run


def main() -> int:
    """Measure and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks")
    parser.add_argument("--steps", default="layers,whole", help="which, in order")
    parser.add_argument("--samples", type=int, default=50, help="pairs of each")
    parser.add_argument("--budget-s", type=float, default=5.0, help="device time for the pairs of a layer")
    given = parser.parse_args()
    names, steps = given.only.split(","), given.steps.split(",")
    if unknown := [*(set(names) - set(NETWORKS)), *(set(steps) - {"layers", "whole"})]:
        parser.error(f"got {', '.join(unknown)}, expected some of {', '.join(NETWORKS)}; layers, whole")
    if not torch.cuda.is_available():
        sys.stderr.write(f"bench_gpu: not run: torch {torch.__version__} has no NVIDIA GPU here.\n")
        return 4
    given.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"format": FORMAT, "machine": machine(), "pairs": given.samples, "layers": [], "whole": []}
    with torch.no_grad(), exact():
        for layer in linear_layers(names) if "layers" in steps else []:
            for kind in KINDS:
                told["layers"].append(layer_row(layer, kind, given))
                _write(told, given.out)
        for name in names if "whole" in steps else []:
            for kind in ("fp16", "bf16"):
                told["whole"].append(whole_row(name, kind, given))
                _write(told, given.out)
    return 0


def machine() -> dict[str, Any]:
    """Return what decides how fast it is here."""
    uuid = torch.cuda.get_device_properties(0).uuid  # other numbers than torch's may be nvidia-smi's
    query = "driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu"
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id=GPU-{uuid}"],
        capture_output=True,
        text=True,
        check=False,
    )
    known = [word.strip() for word in asked.stdout.strip().split(",")] if asked.returncode == 0 else []
    facts = dict(zip(query.split(","), known, strict=True)) if len(known) == len(query.split(",")) else {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusparselt": torch.backends.cusparselt.version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **{name: facts.get(name, "unknown") for name in query.split(",")},
    }


def layer_row(layer: Linear, kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """Time one layer; what torch does not offer, or answers wrongly, has a reason and no time."""
    row: dict[str, Any] = {**asdict(layer), "kind": kind}
    try:
        dense, sparse, search = (int8_calls if kind == "int8" else float_calls)(layer, KINDS[kind])
        off = largest_difference(dense(), sparse())
        if off > (0 if kind == "int8" else NEAR):
            return {**row, "reason": f"wrong answers: off by {off:.2g} of the largest"}
        row |= {"off": off, **pairs_of(many(dense), many(sparse), given, PRODUCTS)}
        if search is not None:
            row |= _searched(dense, search, given)
    except FAILURES as error:
        return {**row, "reason": _first_line(error)}
    finally:
        torch.cuda.empty_cache()
    return row


def _searched(dense: Product, search: Callable[[], Product], given: argparse.Namespace) -> dict[str, Any]:
    try:
        return {"searched": pairs_of(many(dense), many(search()), given, PRODUCTS)["gain"]}
    except FAILURES as error:
        return {"search_failed": _first_line(error)}


def float_calls(layer: Linear, dtype: torch.dtype) -> Calls:
    """Return a layer dense, semi-structured as torch stores it, and what finds the algorithm that is fastest for it."""
    if reason := refusal("MatMul", (layer.outputs, layer.inputs), dtype):
        raise ValueError(reason)
    rows, weight = drawn(layer.rows, layer.inputs, dtype), pruned(drawn(layer.outputs, layer.inputs, dtype))
    bias, stored = drawn(1, layer.outputs, dtype)[0], semi_structured(weight)

    def search() -> Product:
        whole: Any = F.pad(rows, (0, 0, 0, -layer.rows % 8))  # as torch does in every call
        packed: Any = stored
        best = torch._cslt_sparse_mm_search(packed.packed, whole.t(), bias=bias, transpose_result=True)
        other = torch.sparse.to_sparse_semi_structured(weight, alg_id=int(best))
        return lambda: semi_structured_linear(rows, other, bias)

    return (
        lambda: F.linear(rows, weight, bias),
        lambda: semi_structured_linear(rows, stored, bias),
        search,
    )


def int8_calls(layer: Linear, _: torch.dtype) -> Calls:
    """Return a layer of 8-bit integers with 32-bit sums, dense and compressed; torch has no tensor class for these."""
    if layer.rows < INT8_ROWS:
        raise ValueError(f"{layer.rows} rows: torch._int_mm takes {INT8_ROWS} or more on a GPU")
    if layer.inputs % INT8_MULTIPLE or layer.outputs % INT8_MULTIPLE:
        raise ValueError(f"sides are not multiples of {INT8_MULTIPLE}")
    rows = torch.randint(-127, 128, (layer.rows, layer.inputs), dtype=torch.int8, device="cuda")
    weight = pruned(torch.randint(-127, 128, (layer.outputs, layer.inputs), dtype=torch.int8, device="cuda"))
    stored, missing = torch._cslt_compress(weight), -layer.rows % 16

    def sparse() -> Tensor:
        given = F.pad(rows, (0, 0, 0, missing)) if missing else rows
        found = torch._cslt_sparse_mm(stored, given.t(), out_dtype=torch.int32, transpose_result=True)
        return found[: layer.rows]

    return lambda: torch._int_mm(rows, weight.t()), sparse, None


def whole_row(name: str, kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """Time a call of a network at random weights: all linear layers that can be 2:4 dense, then semi-structured."""
    from exporter.lowering.wrappers import wrap

    row: dict[str, Any] = {"network": name, "kind": kind, "share": eligible_share(name)}
    network = NETWORKS[name]
    try:
        module = built(network, "cuda")
        fill(module, KINDS[kind])
        chosen = prune(module)
        inputs = tuple(_drawn_like(value, KINDS[kind]) for value in inputs_of(network, module))
        whole = wrap(module)
        dense = recorded(lambda: _tensors(whole(*inputs)))
        wanted = [value.clone() for value in dense()]
        kept = [layer.weight for layer in chosen.values()]  # the recording reads them where they lie
        for path, layer in chosen.items():
            module.set_submodule(path, SemiStructured(layer))
        sparse = recorded(lambda: _tensors(whole(*inputs)))
        off = max(largest_difference(a, b) for a, b in zip(wanted, sparse(), strict=True))
        longer = argparse.Namespace(**{**vars(given), "budget_s": 10 * given.budget_s})
        row |= {"linear": len(kept), "off": off, **pairs_of(dense, sparse, longer, 1)}
    except FAILURES as error:
        return {**row, "reason": _first_line(error)}
    finally:
        torch.cuda.empty_cache()
    return row


class SemiStructured(nn.Module):
    """A linear layer with a semi-structured weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(semi_structured(layer.weight.detach()), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply rows (..., inputs)."""
        return semi_structured_linear(x, self.weight, self.bias)


def prune(module: nn.Module) -> dict[str, nn.Linear]:
    """Set two of every four inputs of all linear layers that torch can store to zero; return these by path."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not refusal("MatMul", tuple(layer.weight.shape), layer.weight.dtype):
            layer.weight.data = pruned(layer.weight.data)
            found[path] = layer
    return found


def pruned(weight: Tensor) -> Tensor:
    """Return a weight with the two smallest of every four inputs set to zero."""
    return weight * pattern_mask(weight.abs().to(torch.float32), PATTERN).to(weight.dtype)


def fill(module: Any, dtype: torch.dtype, device: str = "cuda") -> None:
    """Give a network random numbers on a device, in the scales of torch's own initialisation."""
    generator = torch.Generator(device).manual_seed(0)
    state = {entry.name: _numbers(entry, dtype, generator) for entry in fills_of(module)}
    module.load_state_dict(state, strict=True, assign=True)
    module.to(device)


def _numbers(entry: Fill, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if entry.given is not None:
        return entry.given.to(generator.device, dtype if entry.given.is_floating_point() else entry.given.dtype)
    made = torch.empty(entry.shape, dtype=dtype, device=generator.device)
    if entry.kind == "uniform":
        return made.uniform_(-entry.scale, entry.scale, generator=generator)
    if entry.kind == "normal":
        return made.normal_(0.0, entry.scale, generator=generator)
    return made.fill_(entry.scale)


def drawn(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return normal numbers that keep products of these widths near one."""
    return (torch.randn(rows, columns, device="cuda") / columns**0.5).to(dtype)


def _drawn_like(value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value.to("cuda")
    return torch.randn(value.shape, device="cuda").to(dtype) if value.ndim > 1 else value.to("cuda", dtype)


def _tensors(answer: Any) -> Sequence[Tensor]:
    return (answer,) if isinstance(answer, Tensor) else tuple(answer)


def many(call: Product) -> Callable[[], object]:
    """Return a recording of a layer's product, over and over."""
    return recorded(lambda: [_last(call)])


def _last(call: Product) -> Tensor:
    """Make a call many times; the memory of all answers but the last is free again."""
    answer = call()
    for _ in range(PRODUCTS - 1):
        answer = call()
    return answer


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return how far two answers are apart, in shares of the largest number of the first; not finite counts as far."""
    wide = a.double()
    found = float((wide - b.double()).abs().max() / wide.abs().max())
    return found if found == found else float("inf")


def pairs_of(
    dense: Callable[[], object],
    sparse: Callable[[], object],
    given: argparse.Namespace,
    products: int,
    clock: DeviceClock | None = None,
) -> dict[str, Any]:
    """Time two calls pair by pair on the device.

    Args:
        dense: the baseline.
        sparse: the one in question.
        given: how many ``samples``, and the ``budget_s`` for them.
        products: that each of the calls makes.
        clock: of the device.

    Returns:
        medians in microseconds of one product, and ``gain``: how many times as fast the sparse one is, with its
        interval.
    """
    clock = clock or DeviceClock()
    timer = Timer(samples=given.samples, budget_s=given.budget_s, clock=clock.read)
    pairs = timer.interleaved(clock.timed(dense), clock.timed(sparse))
    gain = pairs.ratio("2:4")
    return {
        "dense_us": 1e3 * pairs.a.median_ms / products,
        "sparse_us": 1e3 * pairs.b.median_ms / products,
        "gain": {"value": gain.value, "low": gain.low, "high": gain.high, "pairs": gain.pairs},
        "settled": pairs.a.stable and pairs.b.stable,
    }


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _write(told: dict[str, Any], out: Path) -> None:
    """Write what is known so far: a run that ends early leaves what it measured."""
    (out / "gpu.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(table_of(told), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
