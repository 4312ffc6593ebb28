"""Words and calls that have no place in the repository, or only in one file of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A letter in brackets keeps each pattern from finding itself here.
FORBIDDEN = {
    "work left for nobody in particular": r"\b(TOD[O]|FIXM[E]|XX[X])\b",
    "a path of one machine": r"(?<![\w.])/(wor[k]|roo[t]|far[m]|mn[t]|home/\w+|Users/\w+|tmp/\w+)/",
    "the host of a package registry": (
        r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|registry[.]npmjs|deb[.]debian"
    ),
    "a paper that is not in the repository": r"\b(desig[n]|styl[e]|contrac[t]|feasibilit[y]|method[s]|peer[s])\.md\b",
}
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_text_contains(what: str, root: Path, texts: dict[Path, str]) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{file.relative_to(root)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for file, text in texts.items()
        for match in pattern.finditer(text)
    ]
    assert not found, f"{what}: {found}"


def test_nothing_unpickles_or_pickles(root: Path, product: list[Path]) -> None:
    assert not _found(root, product, _is_pickling)


def test_every_refusal_says_why(root: Path, product: list[Path]) -> None:
    assert not _found(root, product, _is_wordless_refusal)


def test_only_the_command_line_prints(root: Path, product: list[Path]) -> None:
    assert not _found(root, [file for file in product if not _is_command_line(root, file)], _is_print)


def test_only_the_command_line_catches_everything(root: Path, product: list[Path]) -> None:
    assert not _found(root, [file for file in product if not _is_command_line(root, file)], _is_broad_handler)


def _is_command_line(root: Path, file: Path) -> bool:
    return file.relative_to(root).parts[:2] in {("exporter", "cli.py"), ("exporter", "cli")}


def _found(root: Path, files: list[Path], is_wrong: Callable[[ast.AST], bool]) -> list[str]:
    return [f"{file.relative_to(root)}:{line}" for file in files for line in _lines(file, is_wrong)]


def _lines(file: Path, is_wrong: Callable[[ast.AST], bool]) -> Iterator[int]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if is_wrong(node):
            yield getattr(node, "lineno", 0)


def _is_pickling(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in PICKLES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        return (node.module or "").split(".")[0] in PICKLES or (
            node.module == "torch" and bool(names & {"load", "save"})
        )
    is_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    return is_torch and node.attr in {"load", "save"}


def _is_wordless_refusal(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id == "NotImplementedError"


def _is_print(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def _is_broad_handler(node: ast.AST) -> bool:
    """Whether it catches everything and keeps it; one that cleans up and raises again is fine."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    names = {name.id for name in caught if isinstance(name, ast.Name)}
    raises_again = isinstance(node.body[-1], ast.Raise)
    return (node.type is None or bool(names & {"Exception", "BaseException"})) and not raises_again
