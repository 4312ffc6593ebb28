"""The way in for those who edit networks: snapshot, edit, diff; and replay of the record.

>>> snapshot = Snapshot.of(network)
>>> # edit the network in place: slice weights, delete list entries, put stand-ins
>>> surgery = diff(snapshot, network)
>>> replay(fresh, Surgery.from_json(surgery.to_json()))
"""

from __future__ import annotations

from exporter.networks.record import Resize, StandIn, Surgery
from exporter.networks.replay import replay
from exporter.networks.snapshot import Snapshot, diff

__all__ = ["Resize", "Snapshot", "StandIn", "Surgery", "diff", "replay"]
