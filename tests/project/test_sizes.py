"""No file and no function grows past what can be read in one go."""

from __future__ import annotations

import ast
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60


def test_no_source_or_script_is_longer_than_the_cap(root: Path, files: list[Path]) -> None:
    sources = [file for file in files if file.suffix in {".py", ".sh", ".j2", ".css", ".js"}]
    long = {str(file.relative_to(root)): lines for file in sources if (lines := _lines(file)) > FILE_LINES}
    assert not long, f"longer than {FILE_LINES} lines: {long}"


def test_no_function_is_longer_than_the_cap(root: Path, python_files: list[Path]) -> None:
    long = []
    for file in python_files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{file.relative_to(root)}:{node.lineno} {node.name}: {lines}")
    assert not long, f"longer than {FUNCTION_LINES} lines: {long}"


def _lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())
