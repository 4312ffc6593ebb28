"""Whatever the product imports is declared, or comes with something that is."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

OURS = {"exporter", "targets", "calibration"}


def test_every_import_is_declared(root: Path, product: list[Path]) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    users = [name for name in project["optional-dependencies"] if name != "dev"]
    lines = [*project["dependencies"], *(line for name in users for line in project["optional-dependencies"][name])]
    declared = {_name(line) for line in lines}
    accounted = declared | {name for distribution in declared for name in _needs(distribution)}
    distributions = packages_distributions()
    undeclared = {
        f"{file.relative_to(root)}: {module}"
        for file in product
        for module in _modules(file)
        if not {_name(found) for found in distributions.get(module, [module])} & accounted
    }
    assert not undeclared


def _modules(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - OURS - set(sys.stdlib_module_names)


def _needs(distribution: str) -> set[str]:
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:  # an extra of another platform
        return set()
    return {_name(line) for line in lines if "extra ==" not in line}


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[(@]", requirement, maxsplit=1)[0]).lower()
