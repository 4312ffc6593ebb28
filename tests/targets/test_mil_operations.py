"""Every operation, saved in a package and evaluated: against its documentation in numpy, and coremltools' values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mil_cases
import mil_cases_dense
import mil_cases_movement
import mil_cases_resizing
import numpy as np
import pytest
from mil_cases import Case
from mil_programs import Array, Halved, builds, own_values, quiet, save_program

ALL = [
    *mil_cases.elementwise(),
    *mil_cases_movement.movement(),
    *mil_cases_dense.dense(),
    *mil_cases_resizing.resizing(),
]
OPSETS = ("iOS16", "iOS17", "iOS18")
ULPS = 4e-6
"""Room for sums in another order, relative to the largest element."""


WRONG = ("concat interleave",)
"""What coremltools computes otherwise than the example in its own documentation."""


class Evaluated:
    """All cases of one opset in one package, evaluated once.

    Attributes:
        ours: case -> results.
        theirs: case -> coremltools' own values of results, where it has any.
    """

    def __init__(self, path: Path, opset: str, cases: Sequence[Case], half: bool = False) -> None:
        from targets.mil.evaluator import Evaluator

        feeds = {
            f"c{i}_{key}": _rounded(value, half) for i, case in enumerate(cases) for key, value in case.inputs.items()
        }
        names: dict[str, list[str]] = {}
        self.theirs = {} if half else {case.name: _listed(own_values(case.inputs, case.build, opset)) for case in cases}

        def build(mb: Any, given: Any) -> list[Any]:
            for index, case in enumerate(cases):
                own = {key: given[f"c{index}_{key}"] for key in case.inputs}
                made = case.build(Halved(mb) if half else mb, **own)
                names[case.name] = [item.name for item in _listed(made)]
            return [mb.identity(x=next(iter(given.values())), name="first")]

        save_program(path, feeds, build, opset)
        evaluator = Evaluator(path, threads=1)
        found: dict[str, Array] = {}
        for operation, results in evaluator.values(feeds):
            found |= {spec.name: value.numpy() for spec, value in zip(operation.outputs, results, strict=True)}
        self.ours = {case: [found[name] for name in listed] for case, listed in names.items()}


def _rounded(value: Array, half: bool) -> Array:
    return value.astype(np.float16) if half and value.dtype == np.float32 else value


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evaluated]:
    with quiet():
        pytest.importorskip("coremltools", reason="coremltools writes the packages; it is not installed")
    folder = tmp_path_factory.mktemp("operations")
    grouped = {opset: [case for case in ALL if case.opset == opset] for opset in OPSETS}
    return {opset: Evaluated(folder / f"{opset}.mlpackage", opset, cases) for opset, cases in grouped.items() if cases}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evaluated]:
    with quiet():
        pytest.importorskip("coremltools", reason="coremltools writes the packages; it is not installed")
    folder, found = tmp_path_factory.mktemp("halved"), {}
    for opset in OPSETS[1:]:
        cases = [case for case in ALL if case.opset == opset or (opset == "iOS17" and case.opset == "iOS16")]
        fit = [
            case for case in cases if builds(_halves(case), lambda mb, _c=case, **i: _c.build(Halved(mb), **i), opset)
        ]
        evaluated = Evaluated(folder / f"{opset}.mlpackage", opset, fit, half=True)
        found |= dict.fromkeys(evaluated.ours, evaluated)
    return found


def _halves(case: Case) -> dict[str, Array]:
    return {key: _rounded(value, True) for key, value in case.inputs.items()}


def _close(ours: Array, wanted: Any, what: str, room: float = ULPS) -> None:
    wanted = np.asarray(wanted)
    assert ours.shape == wanted.shape, what
    if ours.dtype.kind == "f":
        scale = max(np.abs(wanted).max(initial=0), 1e-6)
        assert np.abs(ours - wanted).max(initial=0) <= room * scale, what
    else:
        np.testing.assert_array_equal(ours, wanted, what)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_an_operation_gives_what_its_documentation_says(evaluated: dict[str, Evaluated], case: Case) -> None:
    wide = [value.astype(np.float64) if value.dtype.kind == "f" else value for value in case.inputs.values()]
    ours = evaluated[case.opset].ours[case.name]
    wanted = _listed(case.expected(*wide))
    assert len(ours) == len(wanted)
    for own, other in zip(ours, wanted, strict=True):
        _close(own, other, case.name)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_an_operation_gives_what_coremltools_computes_itself(evaluated: dict[str, Evaluated], case: Case) -> None:
    theirs = evaluated[case.opset].theirs[case.name]
    if case.name in WRONG or any(value is None for value in theirs):
        pytest.skip("coremltools has no value of its own for it")
    for own, other in zip(evaluated[case.opset].ours[case.name], theirs, strict=True):
        _close(own, other, case.name)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_an_operation_rounds_16_bit_floats_only_at_its_end(halved: dict[str, Evaluated], case: Case) -> None:
    if case.name not in halved:
        pytest.skip("it takes 32-bit floats or integers only")
    wide = [value.astype(np.float64) if value.dtype.kind == "f" else value for value in _halves(case).values()]
    wanted = _listed(case.expected(*wide))
    for own, other in zip(halved[case.name].ours[case.name], wanted, strict=True):
        # Constants are rounded as well, which what is expected is not told: two roundings of 2^-11 at most, and sums.
        _close(own, other, case.name, 4e-3)


def test_most_operations_take_16_bit_floats(halved: dict[str, Evaluated]) -> None:
    assert len(halved) >= 0.8 * len(ALL)


def test_cases_have_names_of_their_own_and_cover_every_kernel(evaluated: dict[str, Evaluated]) -> None:
    from targets.mil.kernels import KERNELS

    assert len({case.name for case in ALL}) == len(ALL)
    del evaluated
    tried = {word for case in ALL for word in case.name.split()}
    elsewhere = {name for name in KERNELS if name.startswith("constexpr_")}
    missing = sorted(set(KERNELS) - tried - elsewhere - {"cast", "logical_not", "quantize", "dequantize"})
    assert not missing, list(itertools.chain(missing))
