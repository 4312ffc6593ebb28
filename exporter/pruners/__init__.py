"""Pruning methods, one file each; nothing is imported until chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.pruners.base import Pruner

PRUNERS = {
    "random": "exporter.pruners.random_:Random",
    "magnitude": "exporter.pruners.magnitude:Magnitude",
    "taylor": "exporter.pruners.taylor:Taylor",
    "wanda": "exporter.pruners.wanda:Wanda",
    "sparsegpt": "exporter.pruners.sparsegpt:SparseGPT",
    "diff-pruning": "exporter.pruners.diff_pruning:DiffPruning",
    "snapfusion": "exporter.pruners.snapfusion:SnapFusion",
    "ecodiff": "exporter.pruners.ecodiff:EcoDiff",
    "improved-techniques": "exporter.pruners.improved_techniques:ImprovedTechniques",
    "laptop-diff": "exporter.pruners.laptop_diff:LaptopDiff",
    "sparsedm": "exporter.pruners.sparsedm:SparseDM",
    "dip-go": "exporter.pruners.dip_go:DipGo",
    "deepcache": "exporter.pruners.deepcache:DeepCache",
    "bk-sdm": "exporter.pruners.bk_sdm:BkSdm",
    "obs-diff": "exporter.pruners.obs_diff:ObsDiff",
}
"""The registry: what a recipe calls ``method`` -> ``module:Class``."""


def pruner(name: str) -> type[Pruner]:
    """Return the class of this method; KeyError for a name that is not in `PRUNERS`."""
    module, _, attribute = PRUNERS[name].partition(":")
    found: type[Pruner] = getattr(import_module(module), attribute)
    return found


__all__ = ["PRUNERS", "pruner"]
