"""What a compiler said about sparse kernels, as measurements that gates can ask about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from targets.base import Evidence


@dataclass(frozen=True)
class Weighed:
    """What a graph itself shows.

    Attributes:
        products: node with a constant weight -> multiplications of a call; None where shapes are open.
        taken: how many of these weights sparse kernels could take, by their zeros and shapes.
    """

    products: Mapping[str, int | None]
    taken: int


_SILENT = "the builder's log says nothing about it, which is not the same as none. Look at the evidence of the layers."
_HIDDEN = "not every kernel shows by its name whether it is sparse. Look at the evidence of the layers."
_OPEN = "shapes are open, so what layers multiply is not known. Leave shapes out of the recipe."


def sparse_measurements(evidence: Evidence, place: Place, weigh: Callable[[], Weighed]) -> list[Measurement]:
    """Return ``sparse.eligible``, ``.chosen`` and ``.flop_share``; nothing for a runtime without sparse kernels.

    Three witnesses are heard: what the compiler told, the names of the engine's kernels, and the zeros of the graph.

    Args:
        evidence: of an engine.
        place: its cell and component.
        weigh: the graph that it was compiled from; asked where there is something to weigh.
    """
    told = evidence.sparse
    if told is None:
        return []
    weighed = weigh()
    zeros = f"by its zeros and shapes {weighed.taken} of the graph's {len(weighed.products)} weights could be taken"
    found = []
    for name, count in (("sparse.eligible", told.eligible), ("sparse.chosen", told.chosen)):
        if count is None:
            found.append(place.missing(name, "layers", f"{_SILENT} {zeros.capitalize()}."))
        else:
            note = f"layers, by what {evidence.runtime} told; {zeros}"
            found.append(place.measured(name, count, "layers", note=note))
    return [*found, _share(told.nodes, place, weighed.products)]


def _share(nodes: tuple[str, ...] | None, place: Place, products: Mapping[str, int | None]) -> Measurement:
    name, unit = "sparse.flop_share", "fraction"
    if nodes is None:
        return place.missing(name, unit, _HIDDEN)
    counts = [count for count in products.values() if count is not None]
    if len(counts) < len(products):
        return place.missing(name, unit, _OPEN)
    if not counts:
        return place.missing(name, unit, "the graph multiplies by no constant weight, or is several graphs.")
    on_sparse = sum(products[node] or 0 for node in dict.fromkeys(nodes) if node in products)
    note = "of the multiplications with constant weights, on kernels that are sparse by their names"
    return place.measured(name, on_sparse / sum(counts), unit, samples=1, note=note)
