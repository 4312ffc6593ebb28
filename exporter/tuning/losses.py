"""How far a student is from its teacher: in the answer, and in what the stages in between make of the same input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
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


def feature_loss(
    student: dict[str, Tensor], teacher: dict[str, Tensor], *, normalized: bool = True
) -> tuple[Tensor | None, int]:
    """Return how far the stages of equal shape are from the teacher's, and how many there are.

    Args:
        student: path -> (batch, channels, height, width).
        teacher: the same of the teacher, without gradients.
        normalized: divide each stage's MSE by the teacher's mean square and take the mean over stages; else their sum.

    Returns:
        A scalar, 0 for equal features and, normalized, about 1 for absent ones; None when no shape agrees.

    Source: BK-SDM (arXiv 2305.15798), feature distillation, is the sum; LAPTOP-Diff (arXiv 2404.11098) weighs stages
        by the norm of the teacher's features, because a few with large activations drown the others. Departs: the
        norm is of the batch at hand, not a constant from before; the mean keeps the loss's size whatever the depth.
    """
    terms = []
    for path, target in teacher.items():
        answer = student.get(path)
        if answer is not None and answer.shape == target.shape:
            scale = target.float().square().mean().clamp_min(1e-8) if normalized else 1.0
            terms.append(F.mse_loss(answer.float(), target.float()) / scale)
    if not terms:
        return None, 0
    total = torch.stack(terms)
    return total.mean() if normalized else total.sum(), len(terms)


def guided_loss(answer: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Return the mean squared error of guided answers, over what guidance makes of independent errors.

    Args:
        answer: (2 n, ...) of the student: without the prompts first, then with them.
        target: the same of the teacher.
        scale: (n,) guidance scales w; guided is uncond + w (cond - uncond).

    Source: a reconstruction of the CFG-aware loss of "Improved Techniques for Training Smaller and Faster Stable
        Diffusion" (its abstract only is public), in the form of SnapFusion's L_cfg (arXiv 2306.00980, section 3.2).
        Departs: each row's error is divided by w² + (1 - w)², the factor by which guidance multiplies independent
        errors of the two answers, so that a high scale is no higher learning rate.
    """
    uncond, cond = (answer - target).chunk(2)
    w = scale.reshape(-1, *[1] * (answer.dim() - 1)).to(answer)
    error = uncond + w * (cond - uncond)
    return (error.square() / (w.square() + (1 - w).square())).mean()


def _keep_as(path: str, seen: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[path] = output[0] if isinstance(output, tuple) else output

    return keep
