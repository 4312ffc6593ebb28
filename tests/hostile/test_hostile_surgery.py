"""Surgery records written by somebody else: refused in the form of our errors, whatever they hold; nothing is run."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from exporter.errors import ArtifactError
from exporter.networks.record import MAX_BYTES, Surgery
from exporter.networks.storage import build_network, load_network, load_surgery, save_network
from exporter.networks.surgery import Snapshot, diff, replay

CLS = "UNet2DConditionModel"
GOOD: dict[str, Any] = {
    "format": 1,
    "keep": {"mid_block.attentions": [0]},
    "resize": {"conv_in": {"attributes": {"in_channels": 4}, "parameters": {"weight": [16, 4, 3, 3]}}},
    "stand_in": {"mid_block.attentions.0": {"kind": "bypass"}},
}


def _with(*path: str, value: Any) -> dict[str, Any]:
    """The good record with one place changed."""
    record = copy.deepcopy(GOOD)
    spot = record
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = value
    return record


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Any] = {
    "null": None,
    "list": [GOOD],
    "number": 7,
    "text": "keep",
    "no format": {key: value for key, value in GOOD.items() if key != "format"},
    "format of tomorrow": _with("format", value=2),
    "format true": _with("format", value=True),
    "format text": _with("format", value="1"),
    "unknown verb": _with("insert", value={"conv_in": {}}),
    "verb is a list": _with("keep", value=["conv_in"]),
    "verb is null": _with("stand_in", value=None),
    "dunder path": _with("resize", "__class__.__init__.__globals__", value=GOOD["resize"]["conv_in"]),
    "path to a parent": _with("keep", "../down_blocks", value=[0]),
    "absolute path": _with("keep", "/etc/passwd", value=[0]),
    "empty part": _with("keep", "down_blocks..0", value=[0]),
    "trailing dot": _with("keep", "down_blocks.", value=[0]),
    "newline": _with("keep", "down_blocks\n", value=[0]),
    "empty keep path": _with("keep", "", value=[0]),
    "long path": _with("keep", "a" * 10_000, value=[0]),
    "deep path": _with("keep", ".".join("a" * 200), value=[0]),
    "huge integer": _with("keep", "mid_block.attentions", value=[10**4000]),
    "negative index": _with("keep", "mid_block.attentions", value=[-1]),
    "index true": _with("keep", "mid_block.attentions", value=[True]),
    "index float": _with("keep", "mid_block.attentions", value=[0.0]),
    "index text": _with("keep", "mid_block.attentions", value=["0"]),
    "indices text": _with("keep", "mid_block.attentions", value="0"),
    "too many indices": _with("keep", "mid_block.attentions", value=[0] * 100_000),
    "unknown kind": _with("stand_in", "mid_block.attentions.0", value={"kind": "os.system"}),
    "kind is a path": _with("stand_in", "mid_block.attentions.0", value={"kind": "torch.nn.Identity"}),
    "kind is a list": _with("stand_in", "mid_block.attentions.0", value={"kind": ["bypass"]}),
    "no kind": _with("stand_in", "mid_block.attentions.0", value={}),
    "arguments": _with("stand_in", "mid_block.attentions.0", value={"kind": "bypass", "args": ["x"]}),
    "gather without places": _with("stand_in", "x", value={"kind": "gather"}),
    "gather beyond": _with("stand_in", "x", value={"kind": "gather", "positions": [9], "width": 4}),
    "gather twice": _with("stand_in", "x", value={"kind": "gather", "positions": [1, 1], "width": 4}),
    "gather of the world": _with("stand_in", "x", value={"kind": "gather", "positions": [0], "width": 2**40}),
    "zero width": _with("stand_in", "x", value={"kind": "zero", "width": -4}),
    "attribute of code": _with("resize", "conv_in", "attributes", value={"forward": 1}),
    "attribute of dict": _with("resize", "conv_in", "attributes", value={"__dict__": 1}),
    "attribute not in the list": _with("resize", "conv_in", "attributes", value={"stride": 1}),
    "attribute text": _with("resize", "conv_in", "attributes", value={"in_channels": "4"}),
    "attribute true": _with("resize", "conv_in", "attributes", value={"in_channels": True}),
    "attribute zero": _with("resize", "conv_in", "attributes", value={"num_groups": 0}),
    "attribute negative": _with("resize", "conv_in", "attributes", value={"heads": -8}),
    "attribute huge": _with("resize", "conv_in", "attributes", value={"heads": 10**400}),
    "attribute object": _with("resize", "conv_in", "attributes", value={"heads": {"a": 1}}),
    "scale nan": _with("resize", "conv_in", "attributes", value={"scale": float("nan")}),
    "scale huge": _with("resize", "conv_in", "attributes", value={"scale": 10**400}),
    "shape zero": _with("resize", "conv_in", "parameters", value={"weight": [0, 4]}),
    "shape negative": _with("resize", "conv_in", "parameters", value={"weight": [-1]}),
    "shape huge": _with("resize", "conv_in", "parameters", value={"weight": [2**20, 2**20]}),
    "shape of many axes": _with("resize", "conv_in", "parameters", value={"weight": [1] * 64}),
    "shape text": _with("resize", "conv_in", "parameters", value={"weight": "[4]"}),
    "parameter path": _with("resize", "conv_in", "parameters", value={"weight.data": [4]}),
    "empty entry": _with("resize", "conv_in", value={"attributes": {}, "parameters": {}}),
    "entry is a list": _with("resize", "conv_in", value=[1]),
    "nested": _with("keep", "mid_block.attentions", value=_nested(900)),
    "many entries": _with("keep", value={f"a{i}": [0] for i in range(30_000)}),
}

FORM = re.compile(r"^.+: .*(got|expected) .+\.$", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny denoiser with one removed attention."""
    from diffusers import UNet2DConditionModel

    place = tmp_path_factory.mktemp("unet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
    snapshot = Snapshot.of(net)
    del net.up_blocks[1].attentions[0].transformer_blocks[0]
    save_network(net, place, surgery=diff(snapshot, net), original_config=dict(net.config))
    return place


def _refuses(folder: Path, tmp_path: Path, text: str | bytes) -> str:
    """Load the folder with another record; returns the message of the refusal."""
    for file in folder.iterdir():
        (tmp_path / file.name).unlink(missing_ok=True)
        (tmp_path / file.name).symlink_to(file)
    record = tmp_path / "surgery.json"
    record.unlink()
    record.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError) as caught:
        load_network(tmp_path, cls=CLS)
    message = str(caught.value)
    assert FORM.match(message), message
    assert len(message) < 2_000
    assert "surgery.json" in message or tmp_path.name in message
    return message


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_record_is_refused_where_it_is_read(what: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Surgery.from_json(HOSTILE[what])
    assert FORM.match(str(caught.value))
    assert len(str(caught.value)) < 2_000


def test_the_good_record_is_none_of_them() -> None:
    assert Surgery.from_json(GOOD).to_json() == GOOD


FILES: dict[str, str | bytes] = {
    "empty": "",
    "half": '{"format": 1, "keep"',
    "binary": b"\x80\x04\x95\x00\xff",
    "pickle": b"cos\nsystem\n(S'true'\ntR.",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "digits": '{"format": ' + "9" * 100_000 + "}",
    "nan": json.dumps(_with("resize", "conv_in", "attributes", value={"scale": float("nan")})),
    "twice": '{"format": 1, "format": 1, "keep": {}, "resize": {}, "stand_in": {}}',
    "entry twice": '{"format": 1, "keep": {"a": [0], "a": [1]}, "resize": {}, "stand_in": {}}',
    "surrogate": '{"format": 1, "keep": {"\\ud800": [0]}, "resize": {}, "stand_in": {}}',
}


@pytest.mark.parametrize("what", FILES)
def test_a_hostile_file_is_refused(what: str, folder: Path, tmp_path: Path) -> None:
    _refuses(folder, tmp_path, FILES[what])


def test_a_hundred_megabytes_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "surgery.json"
    with record.open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(ArtifactError, match=f"expected at most {MAX_BYTES}"):
        load_surgery(tmp_path)


FITTING: dict[str, Any] = {
    "another network": _with("keep", "mid_block.attentions", value=[3]),
    "a list that is none": _with("keep", "conv_in", value=[0]),
    "more copies than a network": _with("keep", "down_blocks", value=[0, 1] * 2000),
    "a way through attributes": _with("resize", "config", value=GOOD["resize"]["conv_in"]),
    "a way through a method": _with("stand_in", "forward", value={"kind": "absent"}),
    "a channel more": _with("resize", "conv_in", "parameters", value={"weight": [16, 5, 3, 3]}),
    "a terabyte": _with("resize", "conv_in", "parameters", value={"weight": [2**16, 2**10, 3, 3]}),
    "nothing left": _with("stand_in", "mid_block", value={"kind": "absent"}),
    "an odd head count": {
        **GOOD,
        "keep": {},
        "resize": {"mid_block.attentions.0.transformer_blocks.0.attn1": {"attributes": {"heads": 7}, "parameters": {}}},
        "stand_in": {},
    },
}


@pytest.mark.parametrize("what", FITTING)
def test_a_well_formed_record_of_something_else_is_refused(what: str, folder: Path, tmp_path: Path) -> None:
    _refuses(folder, tmp_path, json.dumps(FITTING[what]))


def test_a_lie_about_behaviour_is_found_by_the_probe(folder: Path, tmp_path: Path) -> None:
    # Every name and shape fits: only the number of heads is another.
    record = json.loads((folder / "surgery.json").read_text())
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    record["resize"][path] = {"attributes": {"heads": 4}, "parameters": {}}
    message = _refuses(folder, tmp_path, json.dumps(record))
    assert "does not answer as when it was saved" in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS = st.sampled_from(["conv_in", "mid_block.attentions", "mid_block.attentions.0", "down_blocks", "norm", "0", ""])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    record=JSON
    | st.fixed_dictionaries(
        {
            "format": st.just(1),
            "keep": st.dictionaries(PATHS, JSON | st.lists(st.integers(-1, 3), max_size=4), max_size=2),
            "resize": st.dictionaries(
                PATHS,
                JSON
                | st.fixed_dictionaries(
                    {
                        "attributes": st.dictionaries(
                            st.sampled_from(["heads", "in_channels", "scale"]), JSON | st.just(4)
                        ),
                        "parameters": st.dictionaries(st.sampled_from(["weight", "bias"]), st.lists(st.integers(0, 9))),
                    }
                ),
                max_size=2,
            ),
            "stand_in": st.dictionaries(
                PATHS,
                JSON | st.fixed_dictionaries({"kind": st.sampled_from(["bypass", "zero", "shortcut", "absent"])}),
                max_size=2,
            ),
        }
    )
)
def test_any_record_is_replayed_or_refused(folder: Path, record: Any) -> None:
    net: nn.Module = copy.deepcopy(_built(folder))
    surgery, refusal = Surgery(), "x: got y."
    try:
        surgery = Surgery.from_json(record)
        replay(net, surgery)
    except ArtifactError as error:
        refusal = str(error)
    assert FORM.match(refusal)
    assert Surgery.from_json(json.loads(json.dumps(surgery.to_json()))) == surgery


_NETWORKS: dict[Path, nn.Module] = {}


def _built(folder: Path) -> nn.Module:
    if folder not in _NETWORKS:
        _NETWORKS[folder] = build_network(folder, cls=CLS)
    return _NETWORKS[folder]
