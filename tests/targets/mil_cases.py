"""Operations of ML Programs with inputs, and what their documentation says that they give, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mil_programs import Array


@dataclass(frozen=True)
class Case:
    """One operation with inputs.

    Attributes:
        name: of the case.
        build: takes coremltools' builder and the inputs by name; returns a result or several.
        inputs: name -> array.
        expected: takes the arrays in order, floats in 64 bits; returns a result or several.
        opset: the first deployment target that has it.
    """

    name: str
    build: Callable[..., Any]
    inputs: Mapping[str, Array]
    expected: Callable[..., Any]
    opset: str = "iOS16"


_ERF = np.vectorize(math.erf)
_RANDOM = np.random.default_rng(5)


def floats(*shape: int, low: float = -2.0, high: float = 2.0) -> Array:
    return _RANDOM.uniform(low, high, shape).astype(np.float32)


def whole(*shape: int, low: int = -4, high: int = 5) -> Array:
    return _RANDOM.integers(low, high, shape).astype(np.int32)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _unary() -> list[Case]:
    wide: dict[str, Callable[[Array], Array]] = {
        "abs": np.abs,
        "atan": np.arctan,
        "ceil": np.ceil,
        "cos": np.cos,
        "cosh": np.cosh,
        "erf": _ERF,
        "exp": np.exp,
        "exp2": np.exp2,
        "floor": np.floor,
        "identity": lambda x: x,
        "relu": lambda x: np.maximum(x, 0),
        "relu6": lambda x: np.clip(x, 0, 6),
        "round": np.round,
        "sigmoid": _sigmoid,
        "sign": np.sign,
        "silu": lambda x: x * _sigmoid(x),
        "sin": np.sin,
        "sinh": np.sinh,
        "softplus": lambda x: np.log(1 + np.exp(x)),
        "softsign": lambda x: x / (1 + np.abs(x)),
        "square": np.square,
        "tan": np.tan,
        "tanh": np.tanh,
    }
    unit: dict[str, Callable[[Array], Array]] = {"acos": np.arccos, "asin": np.arcsin, "atanh": np.arctanh}
    found = [Case(name, _calls(name), {"x": floats(2, 3, 4, low=-3, high=3)}, wide[name]) for name in wide]
    found += [Case(name, _calls(name), {"x": floats(3, 5, low=-0.9, high=0.9)}, unit[name]) for name in unit]
    halves = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997], np.float32)
    found.append(Case("round halves", _calls("round"), {"x": halves}, np.round))
    found.append(Case("sqrt", _calls("sqrt"), {"x": floats(3, 4, low=0, high=9)}, np.sqrt))
    found.append(Case("abs of integers", _calls("abs"), {"x": whole(3, 4)}, np.abs))
    positive = {"x": floats(3, 4, low=0.1, high=9)}
    found.append(Case("inverse", _calls("inverse", epsilon=0.5), positive, lambda x: 1 / (x + 0.5)))
    found.append(Case("log", _calls("log", epsilon=0.5), positive, lambda x: np.log(x + 0.5)))
    found.append(Case("rsqrt", _calls("rsqrt", epsilon=0.5), positive, lambda x: 1 / np.sqrt(x + 0.5)))
    found.append(Case("inverse default", _calls("inverse"), positive, lambda x: 1 / (x + 1e-4)))
    found.append(Case("log default", _calls("log"), positive, np.log))
    found.append(
        Case("clip", _calls("clip", alpha=-0.5, beta=1.25), {"x": floats(9)}, lambda x: np.clip(x, -0.5, 1.25))
    )
    found.append(Case("threshold", _calls("threshold", alpha=0.5), {"x": floats(9)}, lambda x: np.maximum(x, 0.5)))
    to_int = _calls("cast", dtype="int32")
    found.append(Case("cast to integers", to_int, {"x": floats(9, low=-4, high=4)}, lambda x: np.trunc(x)))
    found.append(Case("cast to float", _calls("cast", dtype="fp32"), {"x": whole(9)}, lambda x: x))
    found.append(Case("cast to truth", _calls("cast", dtype="bool"), {"x": whole(9)}, lambda x: x != 0))
    found.append(
        Case(
            "not", lambda mb, x: mb.logical_not(x=mb.greater(x=x, y=np.float32(0))), {"x": floats(9)}, lambda x: x <= 0
        )
    )
    return found


def _calls(name: str, **parameters: Any) -> Callable[..., Any]:
    """Return a builder of one operation: constants are its parameters."""

    def build(mb: Any, **inputs: Any) -> Any:
        given = {key: np.float32(value) if isinstance(value, float) else value for key, value in parameters.items()}
        return getattr(mb, name)(**inputs, **given)

    return build


def _binary() -> list[Case]:
    table: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "real_div": np.divide,
        "floor_div": np.floor_divide,
        "mod": np.mod,
        "maximum": np.maximum,
        "minimum": np.minimum,
        "equal": np.equal,
        "not_equal": np.not_equal,
        "greater": np.greater,
        "greater_equal": np.greater_equal,
        "less": np.less,
        "less_equal": np.less_equal,
    }
    found = []
    for name, function in table.items():
        pair = {"x": floats(2, 1, 4), "y": floats(3, 1, low=0.5, high=2.5)}
        found.append(Case(name, _calls(name), pair, function))
        if name != "real_div":
            ints = {"x": whole(2, 5), "y": whole(5, low=1, high=4)}
            found.append(Case(f"{name} of integers", _calls(name), ints, function))
    found.append(Case("pow", _calls("pow"), {"x": floats(4, low=0.1, high=3), "y": floats(4)}, np.power))
    truths: dict[str, Callable[[Array, Array], Array]] = {
        "logical_and": np.logical_and,
        "logical_or": np.logical_or,
        "logical_xor": np.logical_xor,
    }
    for name, function in truths.items():
        found.append(Case(name, _logical(name), {"x": floats(9), "y": floats(9)}, _on_signs(function)))
    found.append(
        Case(
            "select",
            lambda mb, c, a, b: mb.select(cond=mb.cast(x=c, dtype="bool"), a=a, b=b),
            {"c": whole(3, 4, low=0, high=2), "a": floats(3, 4), "b": floats(3, 4)},
            lambda c, a, b: np.where(c != 0, a, b),
        )
    )
    return found


def _logical(name: str) -> Callable[..., Any]:
    def build(mb: Any, x: Any, y: Any) -> Any:
        zero = np.float32(0)
        return getattr(mb, name)(x=mb.greater(x=x, y=zero), y=mb.greater(x=y, y=zero))

    return build


def _on_signs(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda x, y: function(x > 0, y > 0)


def _activations() -> list[Case]:
    x = {"x": floats(2, 3, 2, 4, low=-3, high=3)}
    slope, power = np.array([0.1, -0.5, 2.0], np.float32), np.array([1.0, 0.5, 1.5], np.float32)
    wide, other = slope.reshape(3, 1, 1).astype(np.float64), power.reshape(3, 1, 1).astype(np.float64)
    root = math.sqrt(2 / math.pi)
    return [
        Case("gelu", _calls("gelu"), x, lambda x: 0.5 * x * (1 + _ERF(x / math.sqrt(2)))),
        Case(
            "gelu tanh",
            _calls("gelu", mode="TANH_APPROXIMATION"),
            x,
            lambda x: 0.5 * x * (1 + np.tanh(root * (x + 0.044715 * x**3))),
        ),
        Case("gelu sigmoid", _calls("gelu", mode="SIGMOID_APPROXIMATION"), x, lambda x: x * _sigmoid(1.702 * x)),
        Case("softmax", _calls("softmax", axis=1), x, lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)),
        Case("softmax default", _calls("softmax"), x, lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
        Case(
            "clamped_relu",
            _calls("clamped_relu", alpha=-0.5, beta=1.0),
            x,
            lambda x: np.where(x >= 0, np.minimum(1, x), np.minimum(1, -0.5 * x)),
        ),
        Case("elu", _calls("elu", alpha=0.7), x, lambda x: np.where(x > 0, x, 0.7 * (np.exp(x) - 1))),
        Case("leaky_relu", _calls("leaky_relu", alpha=0.2), x, lambda x: np.where(x > 0, x, 0.2 * x)),
        Case("linear_activation", _calls("linear_activation", alpha=0.2, beta=1.5), x, lambda x: 0.2 * x + 1.5),
        Case("prelu", _calls("prelu", alpha=slope), x, lambda x: np.where(x > 0, x, wide * x)),
        Case("scaled_tanh", _calls("scaled_tanh", alpha=0.5, beta=1.5), x, lambda x: 0.5 * np.tanh(1.5 * x)),
        Case("sigmoid_hard", _calls("sigmoid_hard", alpha=0.2, beta=0.5), x, lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
        Case(
            "softplus_parametric",
            _calls("softplus_parametric", alpha=slope, beta=power),
            x,
            lambda x: wide * np.log(1 + np.exp(other * x)),
        ),
        Case("thresholded_relu", _calls("thresholded_relu", alpha=0.5), x, lambda x: np.where(x >= 0.5, x, 0)),
    ]


def _reductions() -> list[Case]:
    table: dict[str, Callable[..., Array]] = {
        "reduce_l1_norm": lambda x, **k: np.abs(x).sum(**k),
        "reduce_l2_norm": lambda x, **k: np.sqrt((x**2).sum(**k)),
        "reduce_log_sum": lambda x, **k: np.log(x.sum(**k)),
        "reduce_log_sum_exp": lambda x, **k: np.log(np.exp(x).sum(**k)),
        "reduce_max": lambda x, **k: x.max(**k),
        "reduce_mean": lambda x, **k: x.mean(**k),
        "reduce_min": lambda x, **k: x.min(**k),
        "reduce_prod": lambda x, **k: x.prod(**k),
        "reduce_sum": lambda x, **k: x.sum(**k),
        "reduce_sum_square": lambda x, **k: (x**2).sum(**k),
    }
    found = []
    for name, function in table.items():
        x = {"x": floats(2, 3, 4, low=0.5, high=2)}
        keep = _with(function, axis=(0, 2), keepdims=True)
        found.append(Case(name, _calls(name, axes=[0, -1], keep_dims=True), x, keep))
        found.append(Case(f"{name} of all", _calls(name, keep_dims=False), x, _with(function)))
    ordered = {"x": _RANDOM.permutation(24).reshape(2, 3, 4).astype(np.float32)}
    found += [
        Case("reduce_argmax", _calls("reduce_argmax", axis=1), ordered, lambda x: x.argmax(1)),
        Case("reduce_argmin", _calls("reduce_argmin", axis=-1), ordered, lambda x: x.argmin(-1)),
        Case("cumsum", _calls("cumsum", axis=1), {"x": floats(2, 5)}, lambda x: x.cumsum(1)),
        Case(
            "cumsum exclusive, from the end",
            _calls("cumsum", axis=0, exclusive=True, reverse=True),
            {"x": floats(4, 2)},
            lambda x: x[::-1].cumsum(0)[::-1] - x,
        ),
        Case("argsort", _calls("argsort", axis=1), ordered, lambda x: np.argsort(-x, axis=1)),
        Case("argsort up", _calls("argsort", axis=-1, ascending=True), ordered, lambda x: np.argsort(x, axis=-1)),
        Case(
            "topk",
            _calls("topk", k=2, axis=-1),
            ordered,
            lambda x: (-np.sort(-x, axis=-1)[..., :2], np.argsort(-x, axis=-1)[..., :2]),
        ),
        Case("non_zero", _calls("non_zero"), {"x": whole(3, 4, low=0, high=2)}, lambda x: np.argwhere(x)),
    ]
    return found


def _with(function: Callable[..., Array], **fixed: Any) -> Callable[..., Array]:
    return lambda x: function(x, **fixed)


def elementwise() -> list[Case]:
    return [*_unary(), *_binary(), *_activations(), *_reductions()]
