"""Second-order removal of weights over a whole network: Hessians from recorded calls, a few layers at a time.

The Hessian of a layer's squared output error is the weighted sum of x x^T over what it is given, columns squared in
size: 100 MB for the widest linear layer of Stable Diffusion 1.5, and 1.2 GB for its widest convolution, of 17,280
columns. Two bounds keep that in memory: a layer of more than `WIDEST` columns gets a block-diagonal Hessian, so that
compensation stays inside a block (for that convolution three blocks, each of all channels at three kernel positions);
and only as many Hessians as fit `BUDGET` are gathered in one pass over the calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exporter.artifact import digest_of
from exporter.errors import RecipeError
from exporter.pruners.activations import as_matrix, as_weight, watch
from exporter.pruners.answers import Exam
from exporter.pruners.base import Context
from exporter.pruners.compensation import compensated
from exporter.pruners.patterns import SparseOptions
from exporter.pruners.sparse import SparseLayer
from exporter.tuning.checkpoint import digest_of_tensors, read, write

WIDEST = 8192
"""Columns of the largest whole Hessian."""
BUDGET = 2 * 2**30
"""Bytes of Hessians at a time."""


@dataclass(frozen=True)
class HessianOptions(SparseOptions):
    """Recipe keys of a method that makes good for removed weights by second order.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them are drawn.
        pattern: ``n:m``, at most n of m consecutive inputs of a layer not zero, such as ``2:4``; or ``unstructured``.
        keep_ratio: fraction of a layer's weights that stay, in (0, 1]; for ``unstructured``. Follows from ``n:m``.
        protect: module path patterns that stay dense, all below a match included.
        keep_dense: how many of the most sensitive layers stay dense: those that, masked alone by magnitude, move the
            guided answer most.
        least: fewest inputs and outputs of a layer that gets n:m; narrower ones stay dense. The default is what one
            sparse instruction takes, so that a kernel exists. Those that win are wider: TensorRT's maintainers saw
            gains from 256 on (issues 4065 and 3849 of NVIDIA/TensorRT). Write 256 where only speed there counts.
        permute: reorder the inputs of layers before n:m is put, so that more magnitude stays, wherever the layers that
            make and read them can be reordered alike: feed-forward neurons, values of a head, channels of a norm's
            group inside of a resnet. The dense network answers as before. Off by default: it takes minutes for a large
            network, and other weights stay than without.
        groups: layers are done in so many groups, in the order in which they are called; each is shown what comes
            through the groups before it with their zeros.
        damping: added to the diagonal of a Hessian, as a fraction of its mean.
    """

    groups: int = field(default=4, metadata={"minimum": 1})
    damping: float = field(default=0.01, metadata={"exclusiveMinimum": 0})

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        if self.groups < 1:
            raise RecipeError(f"prune.groups: got {self.groups}, expected a whole number of at least 1. Write 4.")
        if self.damping <= 0:
            raise RecipeError(f"prune.damping: got {self.damping:g}, expected a number above 0. Write 0.01.")


@torch.no_grad()
def remove_by_hessian(
    network: nn.Module,
    layers: Sequence[SparseLayer],
    exam: Exam,
    options: HessianOptions,
    context: Context,
    weights: Sequence[float] = (),
) -> dict[str, Any]:
    """Put zeros into layers, in place, and move what stays so that their answers change least.

    Killed and called again with the same work folder, it goes on behind the last finished group.

    Args:
        network: the denoiser of a state, float32, on the CPU.
        layers: of it, in the order in which they are called.
        exam: the recorded calls.
        options: the recipe's keys.
        context: what the run lends.
        weights: how much each denoising step counts; none for all alike.

    Returns:
        Facts: ``block_diagonal``: path -> number of blocks, for layers that are too wide for a whole Hessian.

    Raises:
        ComponentFailed: inputs that are not finite, or a Hessian without an inverse.
    """
    first = digest_of([digest_of_tensors(network.state_dict()), asdict(options), list(weights), len(exam.calls)])
    size = -(-len(layers) // options.groups)
    for number, begin in enumerate(range(0, len(layers), size)):
        group = layers[begin : begin + size]
        path = context.workdir / f"group-{number}.safetensors"
        key = digest_of([first, [layer.path for layer in group]])
        kept = read(path, key=key)
        if kept is None:
            # All of a group are shown the same network, however many passes their Hessians take.
            done = {
                layer.path: _pruned(layer, gram, options.damping)
                for part in _parts(group)
                for layer, gram in _grams(network, part, exam, context, weights)
            }
            write(path, done, key=key)
        else:
            done = kept.tensors
        for layer in group:
            layer.module.weight.copy_(done[layer.path])
    return {"block_diagonal": {layer.path: blocks for layer in layers if (blocks := _blocks(layer)) > 1}}


def _columns(layer: SparseLayer) -> int:
    return layer.module.weight[0].numel()


def _blocks(layer: SparseLayer) -> int:
    """Return into how many equal blocks of columns a layer's Hessian falls."""
    columns = _columns(layer)
    group = 1 if layer.is_whole else layer.pattern[1]
    return next(
        count
        for count in range(1, columns + 1)
        if columns % count == 0 and columns // count % group == 0 and columns // count <= WIDEST
    )


def _parts(layers: Sequence[SparseLayer]) -> Iterator[list[SparseLayer]]:
    """Yield layers in a row whose Hessians fit the budget together; one alone always fits."""
    part: list[SparseLayer] = []
    used = 0
    for layer in layers:
        needed = 4 * _columns(layer) ** 2 // _blocks(layer)
        if part and used + needed > BUDGET:
            yield part
            part, used = [], 0
        part.append(layer)
        used += needed
    if part:
        yield part


def _grams(
    network: nn.Module, layers: Sequence[SparseLayer], exam: Exam, context: Context, weights: Sequence[float]
) -> Iterator[tuple[SparseLayer, Tensor]]:
    """Yield each layer with 2 sum(w x x^T) / sum(w), as (blocks, columns of one, columns of one)."""
    grams, totals = {}, dict.fromkeys((layer.path for layer in layers), 0.0)
    for layer in layers:
        side = _columns(layer) // _blocks(layer)
        grams[layer.path] = torch.zeros(_blocks(layer), side, side)

    def take(layer: SparseLayer, columns: Tensor, step: int) -> None:
        gram, weight = grams[layer.path], weights[step] if weights else 1.0
        for block, part in zip(gram, torch.split(columns, gram.shape[-1], dim=1), strict=True):
            block.addmm_(part.T, part, alpha=weight)
        totals[layer.path] += weight * len(columns)

    watch(network, layers, exam, take, progress=context.progress)
    for layer in layers:
        yield layer, grams.pop(layer.path).mul_(2 / totals[layer.path])


def _pruned(layer: SparseLayer, gram: Tensor, damping: float) -> Tensor:
    weight = layer.module.weight.detach()
    pattern = layer.pattern[0] / layer.pattern[1] if layer.is_whole else layer.pattern
    parts = torch.split(as_matrix(weight), gram.shape[-1], dim=1)
    done = [compensated(part, block, pattern, damping=damping) for part, block in zip(parts, gram, strict=True)]
    return as_weight(torch.cat(done, dim=1), weight.shape)
