"""What compilers say of sparse kernels becomes numbers, and what they do not say becomes "not measured"."""

from __future__ import annotations

import pytest

from exporter.metrics.place import Place
from exporter.metrics.sparse import Weighed, sparse_measurements
from targets.base import Evidence, Sparse

PLACE = Place("1-pruned", "trt", "unet")
PRODUCTS = {"a": 300, "b": 100, "c": 600}


def found(sparse: Sparse | None, products: dict[str, int | None] = PRODUCTS) -> dict[str, tuple[float | None, str]]:  # type: ignore[assignment]
    evidence = Evidence("TensorRT 11", "gpu", "as in the graph", (), (), sparse)
    return {m.name: (m.value, m.note) for m in sparse_measurements(evidence, PLACE, lambda: Weighed(products, 2))}


def test_a_runtime_without_sparse_kernels_has_no_such_numbers() -> None:
    assert found(None) == {}


def test_the_share_is_of_multiplications_of_nodes_on_sparse_kernels() -> None:
    told = found(Sparse(2, 2, ("a", "b", "b", "a_cast")))
    assert {name: value for name, (value, _) in told.items()} == {
        "sparse.eligible": 2,
        "sparse.chosen": 2,
        "sparse.flop_share": pytest.approx(0.4),
    }
    assert found(Sparse(2, 0, ()))["sparse.flop_share"][0] == 0  # known to be none


@pytest.mark.parametrize(
    ("sparse", "products", "name", "why"),
    [
        (Sparse(None, 1, ("a",)), PRODUCTS, "sparse.eligible", "says nothing about it, which is not the same as none"),
        (Sparse(1, None, ("a",)), PRODUCTS, "sparse.chosen", "says nothing about it"),
        (Sparse(1, 1, None), PRODUCTS, "sparse.flop_share", "not every kernel shows"),
        (Sparse(1, 1, ("a",)), {"a": 300, "b": None}, "sparse.flop_share", "shapes are open"),
        (Sparse(0, 0, ()), {}, "sparse.flop_share", "several graphs"),
    ],
)
def test_what_is_not_known_is_not_measured(
    sparse: Sparse, products: dict[str, int | None], name: str, why: str
) -> None:
    value, note = found(sparse, products)[name]
    assert value is None
    assert why in note


def test_the_zeros_of_the_graph_stand_beside_what_the_compiler_told() -> None:
    for sparse in (Sparse(3, 1), Sparse(None, None)):
        _, note = found(sparse)["sparse.eligible"]
        assert "by its zeros and shapes 2 of the graph's 3 weights could be taken" in note.replace("By", "by")
