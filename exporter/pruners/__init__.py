"""Pruning methods, one file each; nothing is imported until chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.pruners.base import Pruner

PRUNERS = {
    "deepcache": "exporter.pruners.deepcache:DeepCache",
    "random": "exporter.pruners.random_:Random",
    "bk-sdm": "exporter.pruners.bk_sdm:BkSdm",
    "laptop-diff": "exporter.pruners.laptop_diff:LaptopDiff",
    "magnitude": "exporter.pruners.magnitude:Magnitude",
    "improved-techniques": "exporter.pruners.improved_techniques:ImprovedTechniques",
    "taylor": "exporter.pruners.taylor:Taylor",
    "diff-pruning": "exporter.pruners.diff_pruning:DiffPruning",
    "wanda": "exporter.pruners.wanda:Wanda",
    "sparsegpt": "exporter.pruners.sparsegpt:SparseGPT",
    "obs-diff": "exporter.pruners.obs_diff:ObsDiff",
    "sparsedm": "exporter.pruners.sparsedm:SparseDM",
}
"""The registry: what a recipe calls ``method`` -> ``module:Class``."""


def pruner(name: str) -> type[Pruner]:
    """Return the class of this method; KeyError for a name that is not in `PRUNERS`."""
    module, _, attribute = PRUNERS[name].partition(":")
    found: type[Pruner] = getattr(import_module(module), attribute)
    return found


__all__ = ["PRUNERS", "pruner"]
