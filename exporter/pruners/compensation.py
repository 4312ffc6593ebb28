"""Optimal brain surgeon, a column at a time: what is removed is made good by the weights that follow.

Source: SparseGPT (arXiv 2301.00774), algorithm 1 and its n:m form. Departs: columns of a convolution are ordered so
that groups are input channels at one kernel position; of unstructured zeros every block of columns gets its exact
share; columns without any input go first instead of being cleared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.errors import ComponentFailed
from exporter.networks.sparsity import Pattern, pattern_mask

BLOCK = 128
"""Columns whose compensation is gathered before the rest is brought up to date; for n:m rounded down to groups."""


def compensated(matrix: Tensor, hessian: Tensor, pattern: Pattern | float, *, damping: float) -> Tensor:
    """Return a weight with zeros, the others moved so that the answers to recorded inputs change least.

    Args:
        matrix: (outputs, columns) weights, float32 or float64.
        hessian: (columns, columns), proportional to the sum of x x^T over inputs x; symmetric.
        pattern: (n, m) along the columns, or the fraction that stays anywhere.
        damping: is added to the diagonal, as a fraction of its mean.

    Raises:
        ComponentFailed: the Hessian cannot be inverted.
    """
    weights, dead = matrix.clone(), hessian.diagonal() == 0
    factor = _inverse_factor(hessian, dead, damping)
    outputs, columns = weights.shape
    block = BLOCK if isinstance(pattern, float) else max(1, BLOCK // pattern[1]) * pattern[1]
    kept = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, inner = weights[:, start:stop].clone(), factor[start:stop, start:stop]
        scores = _Scores(part, inner.diagonal(), dead[start:stop])
        mask = torch.ones_like(part, dtype=torch.bool)
        if isinstance(pattern, float):
            wanted = round(pattern * outputs * stop) - kept
            kept += wanted
            mask = _highest(scores.of(0, stop - start), wanted)
        errors = torch.zeros_like(part)
        for column in range(stop - start):
            if not isinstance(pattern, float) and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                mask[:, group] = pattern_mask(scores.of(group.start, group.stop), pattern)
            removed = part[:, column] * ~mask[:, column]
            errors[:, column] = removed / inner[column, column]
            part[:, column:] -= torch.outer(errors[:, column], inner[column, column:])
        weights[:, start:stop] = part * mask
        weights[:, stop:] -= errors @ factor[start:stop, stop:]
    return weights


class _Scores:
    """w^2 / [H^-1]_jj of the weights as they are now, H of the columns that are left."""

    def __init__(self, part: Tensor, diagonal: Tensor, dead: Tensor) -> None:
        self._part, self._diagonal, self._dead = part, diagonal, dead

    def of(self, start: int, stop: int) -> Tensor:
        scores = (self._part[:, start:stop] / self._diagonal[start:stop]).square()
        return scores.masked_fill(self._dead[start:stop], -1.0)


def _highest(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.sort(scores.flatten(), descending=True, stable=True).indices[:count]] = True
    return mask.reshape(scores.shape)


def _inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse: row j holds the inverse of what is left from column j on."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    try:
        lower = torch.linalg.cholesky(damped)
        factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    except RuntimeError as error:  # torch.linalg.LinAlgError, which torch does not export to type checkers
        got = f"prune.damping: the Hessian of {len(dead)} columns has no inverse at {damping:g}; expected one."
        raise ComponentFailed(f"{got} Raise damping, or draw more images.") from error
    return factor
