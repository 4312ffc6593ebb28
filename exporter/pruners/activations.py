"""What layers are given while the denoiser answers recorded calls, as the columns that their weights multiply.

The columns of a linear layer are its inputs. Those of a convolution are its input channels at one position of the
kernel after the other, so that m consecutive columns are m consecutive channels at one position: the groups of n:m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.errors import ComponentFailed
from exporter.networks.probe import evaluating
from exporter.progress import Progress, task
from exporter.pruners.answers import Exam
from exporter.pruners.sparse import SparseLayer

POSITIONS = 8192
"""Most rows of columns that one call gives for one layer; of more, so many are taken, evenly spaced."""

Take = Callable[[SparseLayer, Tensor, int], None]
"""(layer, (rows, columns) float32, index of the denoising step) -> nothing."""


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight as (outputs, columns), in the order of the columns of this module."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def as_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Return what `as_matrix` made of a weight of this shape."""
    if len(shape) == 2:
        return matrix
    outputs, inputs, height, width = shape
    return matrix.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2).contiguous()


def columns_of(module: nn.Linear | nn.Conv2d, given: Tensor) -> Tensor:
    """Return what a layer multiplies its weight with, (rows, columns): ``answer = columns @ as_matrix(weight).T``.

    Args:
        module: the layer.
        given: its input, (..., inputs) of a linear layer or (batch, inputs, height, width) of a convolution.
    """
    if isinstance(module, nn.Linear):
        return given.reshape(-1, given.shape[-1])
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ComponentFailed("prune: a convolution with padding by name or not by zeros; got one, expected numbers.")
    patches = F.unfold(given, module.kernel_size, module.dilation, module.padding, module.stride)
    batch, _, positions = patches.shape
    by_position = patches.reshape(batch, given.shape[1], -1, positions)  # channels, kernel positions
    return by_position.permute(0, 3, 2, 1).reshape(batch * positions, -1)


@torch.no_grad()
def watch(network: nn.Module, layers: Sequence[SparseLayer], exam: Exam, take: Take, *, progress: Progress) -> None:
    """Put recorded calls to a network and hand over what its layers are given. The hooks are gone afterwards.

    Args:
        network: denoiser, float32, on the CPU.
        layers: of it.
        exam: the calls, rows without the prompts among them where there is guidance.
        take: is told of every layer and call.
        progress: one unit per call.

    Raises:
        ComponentFailed: a layer was given NaN or infinity.
    """
    steps = {timestep: index for index, timestep in enumerate(dict.fromkeys(asked.timestep for asked in exam.calls))}
    now = [0]
    with ExitStack() as hooks, evaluating(network), task(progress, "watch layers", len(exam.calls)):
        for layer in layers:
            hooks.callback(layer.module.register_forward_pre_hook(_hand_over(layer, take, now)).remove)
        for asked in exam.calls:
            now[0] = steps[asked.timestep]
            network(**asked.arguments, return_dict=False)
            progress.advance()


def _hand_over(layer: SparseLayer, take: Take, now: list[int]) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        columns = columns_of(layer.module, given[0].detach())
        if not bool(torch.isfinite(columns).all()):
            raise ComponentFailed(
                f"prune: {layer.path} was given numbers that are not finite at step {now[0] + 1}; expected numbers. "
                "Load the source in float32."
            )
        if len(columns) > POSITIONS:
            columns = columns[torch.linspace(0, len(columns) - 1, POSITIONS).long()]
        take(layer, columns, now[0])

    return hook


def column_norms(
    network: nn.Module, layers: Sequence[SparseLayer], exam: Exam, *, progress: Progress
) -> dict[str, Tensor]:
    """Return the L2 norm of every column that layers are given over all calls: path -> (columns,) float32.

    A layer that is never called is missing.
    """
    squares: dict[str, Tensor] = {}

    def take(layer: SparseLayer, columns: Tensor, step: int) -> None:
        found = columns.double().square().sum(dim=0)
        squares[layer.path] = squares.get(layer.path, torch.zeros_like(found)) + found

    watch(network, layers, exam, take, progress=progress)
    return {path: value.sqrt().float() for path, value in squares.items()}


def called(network: nn.Module, layers: Sequence[SparseLayer], exam: Exam, *, progress: Progress) -> list[SparseLayer]:
    """Return the layers that a call reaches, in the order in which it first does; the others are left out."""
    order: dict[str, SparseLayer] = {}
    watch(
        network, layers, replace(exam, calls=exam.calls[:1]), lambda layer, *_: _note(order, layer), progress=progress
    )
    return list(order.values())


def _note(order: dict[str, SparseLayer], layer: SparseLayer) -> None:
    order.setdefault(layer.path, layer)
