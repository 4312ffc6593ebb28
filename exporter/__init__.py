"""Prunes, exports, compiles and proves diffusion models for edge devices.

Importing this loads no torch and no runtime.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "ExporterError",
    "Measurement",
    "Recipe",
    "RecipeError",
    "RunRecord",
    "SourceError",
    "ToolMissing",
    "check_recipe",
    "load",
    "read_recipe",
    "run_recipe",
]

_HOMES = {
    "ArtifactError": "exporter.errors",
    "ExporterError": "exporter.errors",
    "Measurement": "exporter.metrics.measurement",
    "Recipe": "exporter.recipe",
    "RecipeError": "exporter.errors",
    "RunRecord": "exporter.report.record",
    "SourceError": "exporter.errors",
    "ToolMissing": "exporter.errors",
    "check_recipe": "exporter.preflight",
    "load": "exporter.runtime",
    "read_recipe": "exporter.recipe",
    "run_recipe": "exporter.run",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `import exporter` stays light."""
    if name not in _HOMES:
        msg = f"module 'exporter' has no attribute '{name}'"
        raise AttributeError(msg)
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
