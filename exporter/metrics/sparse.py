"""What a compiler said about sparse kernels, as measurements that gates can ask about."""

from __future__ import annotations

from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from targets.base import Evidence

_SILENT = "the builder's log says nothing about it, which is not the same as none. Look at the evidence of the layers."


def sparse_measurements(evidence: Evidence, place: Place) -> list[Measurement]:
    """Return ``sparse.eligible`` and ``sparse.chosen``; nothing for a runtime without sparse kernels.

    Args:
        evidence: of an engine.
        place: its cell and component.
    """
    told = evidence.sparse
    if told is None:
        return []
    note = f"layers, by the log of {evidence.runtime}"
    return [
        place.missing(name, "layers", _SILENT) if count is None else place.measured(name, count, "layers", note=note)
        for name, count in (("sparse.eligible", told.eligible), ("sparse.chosen", told.chosen))
    ]
