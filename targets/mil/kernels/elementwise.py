"""Operations on elements: unary, binary, comparisons, activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from targets.mil.kernels.registry import along, kernel

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
_UNARY_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "round": torch.round,  # halves to the even neighbour
    "sign": torch.sign,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "floor_div": torch.floor_divide,
    "mod": torch.remainder,
    "mul": torch.mul,
    "pow": torch.pow,
    "real_div": torch.true_divide,
    "sub": torch.sub,
}
_BINARY_EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal": torch.eq,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "not_equal": torch.ne,
}


def _one(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor) -> Tensor:
        return function(x)

    return run


def _two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return run


for _exact, _table in ((False, _UNARY), (True, _UNARY_EXACT)):
    for _name, _function in _table.items():
        kernel(_name, exact=_exact)(_one(_function))
for _exact, _pairs in ((False, _BINARY), (True, _BINARY_EXACT)):
    for _name, _pair in _pairs.items():
        kernel(_name, "x y", exact=_exact)(_two(_pair))


@kernel("identity", exact=True)
def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


@kernel("cast", exact=True)
def cast(x: Tensor, dtype: str) -> Tensor:
    """Return x; what is declared of the result says the type, and floats lose their fraction on the way to integers."""
    return x != 0 if dtype == "bool" else x


@kernel("clip", exact=True)
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return x between two bounds."""
    return x.clamp(alpha, beta)


@kernel("threshold", exact=True)
def threshold(x: Tensor, alpha: float) -> Tensor:
    """Return x, or a lower bound where x is below."""
    return x.clamp(min=alpha)


@kernel("relu6", exact=True)
def relu6(x: Tensor) -> Tensor:
    """Return x between 0 and 6."""
    return x.clamp(0, 6)


@kernel("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Return 1 / (x + epsilon)."""
    return torch.reciprocal(x + epsilon)


@kernel("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    """Return the natural logarithm of x + epsilon."""
    return torch.log(x + epsilon)


@kernel("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    """Return 1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + epsilon)


@kernel("select", "cond a b", exact=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a where cond is true, b elsewhere."""
    return torch.where(cond.bool(), a, b)


@kernel("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """Return x times the normal distribution's cumulative probability of x, or one of two approximations of it."""
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@kernel("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Return exponentials along an axis, divided by their sum."""
    return torch.softmax(x, axis)


@kernel("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return min(beta, x), with x times alpha where it is negative."""
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@kernel("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    """Return x where positive, else alpha * (e^x - 1)."""
    return F.elu(x, alpha)


@kernel("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """Return x where positive, else alpha * x."""
    return F.leaky_relu(x, alpha)


@kernel("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha * x + beta."""
    return alpha * x + beta


@kernel("prelu", "x alpha")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """Return x where positive, else x times its channel's alpha (channels,)."""
    return torch.where(x > 0, x, x * along(alpha, 1, x.ndim))


@kernel("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha * tanh(beta * x)."""
    return alpha * torch.tanh(beta * x)


@kernel("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha * x + beta between 0 and 1."""
    return (alpha * x + beta).clamp(0, 1)


@kernel("softplus_parametric", "x alpha beta")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return alpha * log(1 + e^(beta * x)), alpha and beta (channels,)."""
    return along(alpha, 1, x.ndim) * F.softplus(along(beta, 1, x.ndim) * x, threshold=math.inf)


@kernel("thresholded_relu", exact=True)
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """Return x where it is at least alpha, else 0."""
    return torch.where(x >= alpha, x, torch.zeros((), dtype=x.dtype))
