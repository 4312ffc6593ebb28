"""What a lint for a device that is not here counts: a share to gate on, no promise of that device."""

from __future__ import annotations

from exporter.metrics.measurement import Measurement
from exporter.metrics.place import Place
from targets.base import Evidence


def placement_measurements(evidence: Evidence, place: Place) -> list[Measurement]:
    """Return ``neural_engine.at_risk``; nothing for a target without such a lint.

    Args:
        evidence: of an engine.
        place: its cell and component.
    """
    told = evidence.placement
    if told is None:
        return []
    share = told.risky / told.operations if told.operations else 0.0
    rules = {finding.rule: finding.count for finding in told.findings}
    note = (
        f"{told.risky} of {told.operations} operations break a rule of the {told.device}'s vendor, or one that was "
        "seen at work; a lint, which certifies nothing: where an operation runs, only the device decides"
    )
    return [
        place.measured("neural_engine.at_risk", share, "fraction", samples=1, note=note, detail={"findings": rules})
    ]
