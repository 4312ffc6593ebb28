"""What a compiler said about sparse kernels, as measurements that gates can ask about."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from targets.base import Evidence

Products = Mapping[str, int | None]
"""Node of a graph with a constant weight -> multiplications of a call; None where shapes are open."""

_SILENT = "the builder's log says nothing about it, which is not the same as none. Look at the evidence of the layers."
_HIDDEN = "not every kernel shows by its name whether it is sparse. Look at the evidence of the layers."
_OPEN = "shapes are open, so what layers multiply is not known. Leave shapes out of the recipe."


def sparse_measurements(evidence: Evidence, place: Place, products: Callable[[], Products]) -> list[Measurement]:
    """Return ``sparse.eligible``, ``.chosen`` and ``.flop_share``; nothing for a runtime without sparse kernels.

    Args:
        evidence: of an engine.
        place: its cell and component.
        products: of the graph that it was compiled from; asked where there is something to weigh.
    """
    told = evidence.sparse
    if told is None:
        return []
    note = f"layers, by the log of {evidence.runtime}"
    counts = [
        place.missing(name, "layers", _SILENT) if count is None else place.measured(name, count, "layers", note=note)
        for name, count in (("sparse.eligible", told.eligible), ("sparse.chosen", told.chosen))
    ]
    return [*counts, _share(told.nodes, place, products)]


def _share(nodes: tuple[str, ...] | None, place: Place, products: Callable[[], Products]) -> Measurement:
    name, unit = "sparse.flop_share", "fraction"
    if nodes is None:
        return place.missing(name, unit, _HIDDEN)
    known = products()
    counts = [count for count in known.values() if count is not None]
    if len(counts) < len(known):
        return place.missing(name, unit, _OPEN)
    if not counts:
        return place.missing(name, unit, "the graph multiplies by no constant weight, or is several graphs.")
    on_sparse = sum(known[node] or 0 for node in dict.fromkeys(nodes) if node in known)
    note = "of the multiplications with constant weights, on kernels that are sparse by their names"
    return place.measured(name, on_sparse / sum(counts), unit, samples=1, note=note)
