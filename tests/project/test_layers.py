"""Who may know whom: the contracts of pyproject.toml, and the borders once more by reading the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FORBIDDEN = {"targets": {"exporter", "calibration"}, "calibration": {"exporter", "targets"}}
RUNTIMES = {"openvino", "onnxruntime", "coremltools", "tensorrt", "tensorrt_rtx"}


def test_the_layers_of_pyproject_hold(root: Path) -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-logo"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", FORBIDDEN)
def test_what_crosses_a_border_is_data(package: str, root: Path, product: list[Path]) -> None:
    inside = [file for file in product if file.relative_to(root).parts[0] == package]
    assert inside
    wrong = [
        f"{file.relative_to(root)}: {name}"
        for file in inside
        for name in _imported(file)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def test_each_runtime_is_imported_in_one_place(root: Path, product: list[Path]) -> None:
    places: dict[str, set[str]] = {}
    for file in product:
        for name in _imported(file):
            library = name.split(".")[0]
            if library in RUNTIMES:
                places.setdefault(library, set()).add("/".join(file.relative_to(root).parts[:2]).removesuffix(".py"))
    assert all(len(where) == 1 and next(iter(where)).startswith("targets/") for where in places.values()), places


def test_imports_are_absolute(root: Path, python_files: list[Path]) -> None:
    relative = [
        f"{file.relative_to(root)}:{node.lineno}"
        for file in python_files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_no_file_is_named_like_a_library_it_could_hide(root: Path, product: list[Path]) -> None:
    libraries = RUNTIMES | {"torch", "diffusers", "transformers", "onnx", "nncf", "accelerate", "optimum", "numpy"}
    named = [str(file.relative_to(root)) for file in product if {file.stem, file.parent.name} & libraries]
    assert not named


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"import_module", "importlib.import_module"}:
            yield from (
                item.value for item in node.args if isinstance(item, ast.Constant) and isinstance(item.value, str)
            )
