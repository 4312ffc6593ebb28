"""Sessions of a network as callers want them: graphs of a schedule as one, and any number of rows at a time.

Nothing here needs torch, so that engines are opened and asked in the same way on hosts that have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.networks.chain import ChainSession
from exporter.networks.inputs import SHARED
from exporter.networks.schedule import read_schedule
from targets.base import Profiled, Session, Target, TargetError, check_feeds, engine_file_of

Array = NDArray[Any]
Feeds = Mapping[str, Array]


def open_network(target: Target, folder: Path, options: Any) -> Session:
    """Load what was compiled of one component: one graph, or those of its schedule as one session.

    Args:
        target: that compiled it.
        folder: with the engine's files, and ``schedule.json`` where there is one.
        options: of the target.

    Raises:
        TargetError: a graph could not be loaded; those that were are closed.
    """
    schedule = read_schedule(folder)
    if schedule is None:
        return target.open(folder, options)
    ending = Path(engine_file_of(target, options)).suffix
    parts: list[Profiled] = []
    try:
        for pattern in schedule.patterns:
            parts.append(target.open(folder / f"{pattern.name}{ending}", options))  # noqa: PERF401 - what is open is closed
    except TargetError:
        for part in parts:
            part.close()
        raise
    return ChainSession(schedule, parts, run_batched)


def fitted(session: Session, calls: Iterable[Feeds]) -> list[dict[str, Array]]:
    """Return calls with exactly the inputs, the types and the rows that an engine was compiled for.

    Args:
        session: of the engine.
        calls: recorded, with at most so many rows; missing ones are repeated.
    """
    rows = session.rows if isinstance(session, ChainSession) else -1
    found = []
    for call in calls:
        feeds = {}
        for spec in session.inputs:
            array = np.asarray(call[spec.name], dtype=spec.dtype)
            wanted = max(rows, spec.shape[0]) if array.ndim else -1
            if array.ndim and wanted not in (-1, len(array)):  # fewer prompts recorded than the batch holds
                array = np.resize(array, (wanted, *array.shape[1:]))
            feeds[spec.name] = np.ascontiguousarray(array) if array.ndim else array
        found.append(feeds)
    return found


def run_batched(session: Session, feeds: Feeds) -> dict[str, Array]:
    """Run a session whose batch is fixed on any number of rows: in chunks, the last one filled up by repetition.

    Args:
        session: inputs carry the batch on their first axis; a scalar (a U-Net's timestep) and `SHARED` do not.
        feeds: as `Session.__call__`, but cast to the session's dtypes here and with any number of rows.

    Returns:
        As `Session.__call__`, with as many rows as were fed, in memory that the next call does not touch.
    """
    specs = {spec.name: spec for spec in session.inputs}
    cast = {
        name: np.asarray(array, dtype=specs[name].dtype, order="C") if name in specs else array
        for name, array in feeds.items()
    }
    rows = next((len(array) for name, array in cast.items() if _has_rows(name, array)), 1)
    fixed = next((spec.shape[0] for spec in session.inputs if spec.shape and spec.name not in SHARED), -1)
    if fixed in (-1, rows):
        return {name: np.array(array) for name, array in session(cast).items()}
    parts = [_chunk(session, cast, start, fixed) for start in range(0, rows, fixed)]
    return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}


def _has_rows(name: str, array: Array) -> bool:
    return array.ndim > 0 and name not in SHARED


def _chunk(session: Session, feeds: Feeds, start: int, size: int) -> dict[str, Array]:
    chunk: dict[str, Array] = {}
    for name, array in feeds.items():
        part = array[start : start + size] if _has_rows(name, array) else array
        missing = size - len(part) if _has_rows(name, array) else 0
        chunk[name] = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
    check_feeds(session.inputs, chunk, "engine")
    return {name: np.array(array) for name, array in session(chunk).items()}
