"""Muon for weight matrices and AdamW for the rest: on two CPU cores, a fifth of the steps that AdamW alone needs.

Muon (momentum, orthogonalised by Newton-Schulz) is scaled to AdamW's size of a step, so that one rate serves both.
"""

from __future__ import annotations

import torch
from torch import nn

Polynomials = tuple[tuple[float, float, float], ...]
"""Coefficients of x, x^3 and x^5, one triple an iteration."""
FIVE: Polynomials = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's own iterations: precise, for networks whose steps are long anyway."""
THREE: Polynomials = (
    (8.287212, -23.595887, 17.300387),
    (4.107059, -2.947850, 0.544843),
    (3.948691, -2.908902, 0.551819),
)
"""The first three of "Polar Express" (arXiv 2505.16932): half the time."""
_MOMENTUM = 0.95


def orthogonal(matrices: torch.Tensor, polynomials: Polynomials) -> torch.Tensor:
    """Bring the singular values of matrices near 1.

    The Newton-Schulz iterations run on the small Gram matrices: all its polynomials are symmetric and commute.

    Args:
        matrices: (n, rows, columns), rows <= columns.
        polynomials: The iterations.

    Returns:
        The same shape.
    """
    scaled = matrices / (1.01 * matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = scaled @ scaled.mT
    eye = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype).expand_as(gram)
    product = eye
    for iteration, (a, b, c) in enumerate(polynomials):
        factor = a * eye + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = factor @ product if iteration else factor
        if iteration < len(polynomials) - 1:
            gram = factor @ (factor @ gram)
    found: torch.Tensor = product @ scaled
    return found


class MuonAdamW:
    """Optimizer of one network: Muon for weights of two or more dimensions, AdamW for the others and for embeddings.

    Args:
        model: Network to optimise; weights that need no gradient are left out.
        weight_decay: Decoupled weight decay of the matrices.
        polynomials: Iterations of Muon, None for plain AdamW.
    """

    def __init__(self, model: nn.Module, weight_decay: float, polynomials: Polynomials | None) -> None:
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        chosen = {name for name, weight in named if polynomials and weight.ndim >= 2 and id(weight) not in tables}
        self.weight_decay = weight_decay
        self.polynomials = polynomials or ()
        self.matrices = {name: weight for name, weight in named if name in chosen}
        self.others = {name: weight for name, weight in named if name not in chosen}
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.matrices.items()}
        self.groups: dict[tuple[int, int], list[str]] = {}
        for name, weight in self.matrices.items():
            rows, columns = weight.shape[0], weight[0].numel()
            self.groups.setdefault((min(rows, columns), max(rows, columns)), []).append(name)
        self.adam = torch.optim.AdamW(
            [
                {"params": [w for w in self.others.values() if w.ndim >= 2], "weight_decay": weight_decay},
                {"params": [w for w in self.others.values() if w.ndim < 2], "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.99),
            fused=True,
        )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the weights by their gradients, then clear these.

        Args:
            rate: Learning rate, in AdamW's sense.
        """
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for (rows, columns), names in self.groups.items():
            updates = []
            for name in names:
                gradient, momentum = self.matrices[name].grad, self.momentum[name]
                gradient = torch.zeros_like(momentum) if gradient is None else gradient
                momentum.lerp_(gradient, 1 - _MOMENTUM)
                flat = gradient.lerp(momentum, _MOMENTUM).flatten(1)
                updates.append(flat if flat.shape == (rows, columns) else flat.mT)
            scale = 0.2 * columns**0.5
            for name, update in zip(names, orthogonal(torch.stack(updates), self.polynomials), strict=True):
                weight = self.matrices[name]
                flat = update if weight.flatten(1).shape == (rows, columns) else update.mT
                weight.mul_(1 - rate * self.weight_decay).add_(flat.reshape(weight.shape), alpha=-rate * scale)
        for weight in (*self.matrices.values(), *self.others.values()):
            weight.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's state.

        Returns:
            Tensors by name: ``momentum.NAME`` for Muon, ``first.NAME`` and ``second.NAME`` for AdamW.
        """
        found = {f"momentum.{name}": value for name, value in self.momentum.items()}
        for name, weight in self.others.items():
            state = self.adam.state[weight]
            found[f"first.{name}"], found[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        return found

    def state_names(self) -> set[str]:
        """Return the names that `state` has once a step was taken."""
        names = {f"momentum.{name}" for name in self.matrices}
        return names | {f"{kind}.{name}" for name in self.others for kind in ("first", "second")}

    def load_state(self, stored: dict[str, torch.Tensor], step: int) -> None:
        """Take over a state.

        Args:
            stored: What `state` returned.
            step: Number of steps taken.
        """
        for name, momentum in self.momentum.items():
            momentum.copy_(stored[f"momentum.{name}"])
        for name, weight in self.others.items():
            self.adam.state[weight] = {
                "step": torch.tensor(float(step), device=weight.device),
                "exp_avg": stored[f"first.{name}"].to(weight),
                "exp_avg_sq": stored[f"second.{name}"].to(weight),
            }
