"""How far a student is from its teacher: in the answer, and in what the stages in between make of the same input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def stage_outputs(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record what the down, middle and up stages of a denoiser answer, by path, until the end of the block.

    Every forward pass overwrites the last. The hooks are gone afterwards, whatever happens.
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path in stages_of(network):
            handle = network.get_submodule(path).register_forward_hook(_keep_as(path, seen))
            hooks.callback(handle.remove)
        yield seen


def stages_of(network: nn.Module) -> list[str]:
    """Return the paths of a UNet2DConditionModel's stages: ``down_blocks.0`` to ``up_blocks.n``."""
    stages = []
    for name, child in network.named_children():
        if name in ("down_blocks", "up_blocks"):
            stages += [f"{name}.{index}" for index, _ in child.named_children()]
        elif name == "mid_block":
            stages.append(name)
    return stages


def feature_loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> tuple[Tensor | None, int]:
    """Return the mean over stages of equal shape of MSE / teacher's mean square, and how many there are.

    Args:
        student: path -> (batch, channels, height, width).
        teacher: the same of the teacher, without gradients.

    Returns:
        A scalar that is 0 for equal features and about 1 for absent ones; None when no shape agrees.

    Source: BK-SDM (arXiv 2305.15798), feature distillation. Departs: each stage is divided by the teacher's mean
        square, so that stages with large activations do not drown the others.
    """
    terms = []
    for path, target in teacher.items():
        answer = student.get(path)
        if answer is not None and answer.shape == target.shape:
            scale = target.float().square().mean().clamp_min(1e-8)
            terms.append(F.mse_loss(answer.float(), target.float()) / scale)
    if not terms:
        return None, 0
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total / len(terms), len(terms)


def _keep_as(path: str, seen: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[path] = output[0] if isinstance(output, tuple) else output

    return keep
