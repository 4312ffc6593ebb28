"""Random edits of random sort on a tiny network of every class: the record alone gives the edited network back."""

from __future__ import annotations

import copy
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_samples import CLASSES, EDITS, assert_same_answers, config_of, network, rebuilt, shapes

from exporter.networks.surgery import Snapshot, Surgery, diff

EXAMPLES = settings(max_examples=25, derandomize=True, deadline=None)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for cls in CLASSES:
        folders[cls] = tmp_path_factory.mktemp(cls)
        (folders[cls] / "config.json").write_text(json.dumps(config_of(_template(cls))), encoding="utf-8")
    return folders


@cache
def _template(cls: str) -> Any:
    return network(cls)


def _edit(net: Any, moves: list[tuple[int, int]]) -> Surgery:
    snapshot = Snapshot.of(net)
    edits = EDITS[type(net).__name__]
    for number, seed in moves:
        edits[number % len(edits)](net, random.Random(seed))
    return diff(snapshot, net)


MOVES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2**16)), max_size=4)


@pytest.mark.parametrize("cls", CLASSES)
@EXAMPLES
@given(first=MOVES, second=MOVES)
def test_the_record_gives_the_edited_network_back(
    cls: str, configs: dict[str, Path], first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    net = copy.deepcopy(_template(cls))
    whole = Snapshot.of(net)

    one = _edit(net, first)
    after_one = copy.deepcopy(net)
    two = _edit(net, second)
    both = diff(whole, net)

    for record in (one, two, both):
        assert Surgery.from_json(json.loads(json.dumps(record.to_json()))) == record
    composed = one.then(two)
    equal = [(after_one, one), (net, both)] if composed == both else [(after_one, one), (net, both), (net, composed)]
    for edited, record in equal:
        again = rebuilt(edited, record, configs[cls])
        assert shapes(again) == shapes(edited)
        assert_same_answers(again, edited)


@pytest.mark.parametrize("cls", CLASSES)
def test_no_edit_is_an_empty_record(cls: str) -> None:
    net = network(cls)
    surgery = diff(Snapshot.of(net), net)
    assert surgery.is_empty
    assert surgery == Surgery()
    assert surgery.then(Surgery()) == Surgery()
