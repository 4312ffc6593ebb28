"""What the README tells people to type exists: commands, options, recipes, scripts, modules, files, extras."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from exporter.recipe import read_recipe, recipe_names

GROUPS = ("bench",)
"""Commands that have commands of their own."""
EXPORTER = Path(sys.executable).with_name("exporter")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)|<(?:img|source)[^>]*\bsrc(?:set)?=\"([^\"]+)\"")


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def commands(readme: str) -> list[list[str]]:
    """Lines of the shell blocks and calls in running text, without prompt, comment and environment, as words."""
    blocks = [body for language, body in FENCE.findall(readme) if language in {"sh", "bash", "shell", "console"}]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(exporter [^`]+)`", FENCE.sub("", readme))
    return [words for line in lines if (words := _words(line))]


def test_readme_opens_with_the_two_commands(commands: list[list[str]]) -> None:
    assert [words[-1] for words in commands[:2]] == ["ci/run.sh", "ci/test.sh"]


def test_subcommands_and_options_exist(commands: list[list[str]]) -> None:
    called = [words for words in commands if words[0] == "exporter"]
    assert called, "the README shows no call of exporter"
    for words in called:
        given = words[1:]
        subcommand = given[0] if given and not given[0].startswith("-") else ""
        if subcommand:
            assert subcommand in _subcommands(), words
        if subcommand in GROUPS:
            subcommand = f"{subcommand} {given[1]}"
        known = _options(subcommand)
        unknown = [word for word in given if re.match(r"--?[a-zA-Z]", word) and word.split("=")[0] not in known]
        assert not unknown, f"{shlex.join(words)}: {unknown} is not in exporter {subcommand} --help"


def test_recipes_that_are_named_ship(commands: list[list[str]]) -> None:
    for words in commands:
        if words[0] == "exporter" and len(words) > 2 and words[1] in {"run", "check"} and words[2] != "RECIPE":
            assert words[2] in recipe_names() or words[2].endswith((".yaml", ".yml")), words


def test_scripts_and_modules_exist(commands: list[list[str]], root: Path) -> None:
    for words in commands:
        scripts = [word for word in words if word.endswith(".sh")]
        assert all((root / script).is_file() for script in scripts), words
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in {"exporter", "targets", "calibration"}:
            assert importlib.util.find_spec(words[2]) is not None, words


def test_files_that_are_linked_exist(readme: str, root: Path) -> None:
    links = [first or second for first, second in LINK.findall(readme)]
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (root / link).exists()] == []


def test_extras_that_are_named_exist(readme: str, root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {extra for group in re.findall(r"diffusion-exporter\[([\w,-]+)\]", readme) for extra in group.split(",")}
    assert named <= set(extras)


def test_recipes_that_are_shown_are_valid(readme: str, tmp_path: Path) -> None:
    shown = [body for language, body in FENCE.findall(readme) if language in {"yaml", "yml"}]
    assert shown
    for body in shown:
        (tmp_path / "shown.yaml").write_text(body, encoding="utf-8")
        read_recipe(tmp_path / "shown.yaml")


def test_nothing_is_left_to_fill_in(readme: str) -> None:
    assert re.findall(r"^[A-Z]{4,}$", readme, re.M) == []


def test_python_examples_compile(readme: str) -> None:
    for language, body in FENCE.findall(readme):
        if language in {"python", "py"}:
            compile(body, "README.md", "exec")


def _words(line: str) -> list[str]:
    words = shlex.split(line.strip().removeprefix("$ "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


@cache
def _help(subcommand: str) -> str:
    command = [EXPORTER, *subcommand.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _subcommands() -> set[str]:
    return set(re.findall(r"^\W*([a-z][a-z-]*)\s", _help(""), re.M))


def _options(subcommand: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", _help(subcommand)))
