"""Python's cyclic garbage, looked for less often while graphs of many small objects are built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_SELDOM = (200_000, 20, 100)
"""Objects, then rounds, after which it is looked for. Python's own 700 have tracing a U-Net spend an eighth of its time
on looking through objects that are all in use; what lies about meanwhile is small, as large things are few."""


@contextmanager
def collected_seldom() -> Iterator[None]:
    """Look for cyclic garbage seldom within the context, and as before after it."""
    before = gc.get_threshold()
    gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
