from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.errors import CalibrationError
from calibration.prompts import PromptSet, load_prompts

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1).filter(str.strip)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a red circle\n\n  a blue star  \n"),
        ("a.TXT", "a red circle\r\na blue star"),
        ("a.csv", "id,prompt\n1,a red circle\n2,a blue star\n"),
        ("a.csv", 'text,seed\n"a red circle",4\na blue star,5\n'),
        ("a.csv", "\ufeffprompt\na red circle\na blue star\n"),
        ("a.jsonl", '{"prompt": "a red circle", "seed": 1}\n\n{"text": "a blue star"}\n'),
    ],
)
def test_every_format_gives_the_same_set(tmp_path: Path, name: str, content: str) -> None:
    found = load_prompts(write(tmp_path, name, content))
    assert found.prompts == ("a red circle", "a blue star")
    assert found.name == name
    assert found.digest == PromptSet.of("another name", ["a red circle", "a blue star"]).digest


def test_csv_keeps_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", 'prompt\n"a ""big"" circle, red\non gray"\n')
    assert load_prompts(path).prompts == ('a "big" circle, red\non gray',)


def test_digest_depends_on_text_and_order() -> None:
    digests = {PromptSet.of("x", prompts).digest for prompts in (["a", "b"], ["b", "a"], ["a b"], ["a", "b", "b"])}
    assert len(digests) == 4


@given(st.lists(TEXT, min_size=1))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    content = "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts)
    path = write(tmp_path_factory.mktemp("prompts"), "p.jsonl", content)
    assert load_prompts(path).prompts == tuple(prompt.strip() for prompt in prompts)


def test_named_set_is_made_when_asked_for() -> None:
    named = {"mine": lambda: ["a star"], "broken": lambda: [][0:0]}
    assert load_prompts("mine", named=named).prompts == ("a star",)
    with pytest.raises(CalibrationError, match="prompts broken: empty; got 0 prompts"):
        load_prompts("broken", named=named)


def test_unknown_name_suggests_the_closest() -> None:
    named = {"shapes-validation": lambda: ["a"], "shapes-calibration": lambda: ["a"]}
    with pytest.raises(CalibrationError, match=r"Did you mean 'shapes-validation'\?"):
        load_prompts("shapes-validatoin", named=named)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", "", "empty; got 0 prompts"),
        ("p.txt", "\n  \n", "empty; got 0 prompts"),
        ("p.csv", "", r"no prompt column; got \[\]"),
        ("p.csv", "prompt\n", "empty; got 0 prompts"),
        ("p.csv", "caption\na star\n", r"no prompt column; got \['caption'\]"),
        ("p.csv", "prompt,seed\n,4\n", "line 2: blank prompt"),
        ("p.csv", "seed,prompt\n4\n", "line 2: blank prompt; got None"),
        ("p.csv", 'prompt\n"a star\n', "not CSV"),
        ("p.jsonl", "a star\n", "line 1: not JSON"),
        ("p.jsonl", '{"prompt": "a star"}\n["a star"]\n', "line 2: no prompt; got list"),
        ("p.jsonl", '{"caption": "a star"}\n', r"line 1: no prompt; got \['caption'\]"),
        ("p.jsonl", '{"prompt": 4}\n', "line 1: blank prompt; got 4"),
        ("p.jsonl", '{"prompt": " "}\n', "line 1: blank prompt; got ' '"),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("p.txt", b"a star\n\xff\xfe\n", "not UTF-8 text; got byte 0xff at offset 7"),
        ("p.parquet", "a star", "unknown; got"),
    ],
)
def test_bad_files_say_what_is_wrong_and_where(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    with pytest.raises(CalibrationError, match=told) as caught:
        load_prompts(write(tmp_path, name, content))
    assert name in str(caught.value)
    assert "expected" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("none.txt", "folder.txt"):
        with pytest.raises(CalibrationError, match="cannot be read"):
            load_prompts(tmp_path / name)


def test_first_takes_the_first_and_refuses_more_than_there_are() -> None:
    prompts = PromptSet.of("x", ["a", "b", "c"])
    assert prompts.first(2).prompts == ("a", "b")
    assert prompts.first(3) is prompts
    for count in (0, 4):
        with pytest.raises(CalibrationError, match=f"got {count}, expected 1 to 3"):
            prompts.first(count)


def test_blank_prompt_in_a_named_set() -> None:
    with pytest.raises(CalibrationError, match="prompt 1 is blank"):
        PromptSet.of("x", ["a", " "])
