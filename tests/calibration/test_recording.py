from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from calibration.errors import CalibrationError
from calibration.index import Index, file_digest, read_index
from calibration.recording import Recording

pytestmark = pytest.mark.filterwarnings(
    # diffusers' schedulers hand torch tensors to numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture
def folder(recording: Recording, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(recording.folder, tmp_path / "copy"))


def sign(folder: Path, **changes: Any) -> None:
    """Change the index as an attacker would, who can compute digests too."""
    content = {**json.loads((folder / "index.json").read_text()), **changes}
    (folder / "index.json").write_text(Index.model_validate(content).signed().model_dump_json())


def test_open_reads_what_was_written(recording: Recording) -> None:
    again = Recording.open(recording.folder)
    assert again.digest == recording.digest
    assert len(again) == again.count == 3
    assert again.guidance == 4.0
    assert again.images().shape == (3, 64, 64, 3)
    assert again.images().dtype == np.uint8
    assert again.fed("vae")["latent_sample"].shape == (3, 4, 8, 8)
    for name in ("sample", "cond", "uncond", "guided"):
        array = getattr(again.calls(0), name)
        assert array.shape == (3, 4, 8, 8)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous


def test_slices_over_shards_are_parts_of_the_whole(recording: Recording) -> None:
    whole = recording.calls(2)
    for start, stop in ((0, 1), (1, 3), (2, 3), (0, 3)):
        part = recording.calls(2, start, stop)
        assert np.array_equal(part.sample, whole.sample[start:stop])
        for name, array in whole.given.items():
            assert np.array_equal(part.given[name], array[start:stop])
    assert np.array_equal(recording.images(1, 3), recording.images()[1:])


def test_each_call_visits_every_step_and_prompt_once(recording: Recording) -> None:
    seen = [(call.step, len(call.sample)) for call in recording.each_call(batch=2)]
    assert seen == [(0, 2), (0, 1), (1, 2), (1, 1), (2, 2), (2, 1)]
    assert [len(call.sample) for call in recording.each_call()] == [3, 3, 3]


def test_index_is_strict_json_although_schedulers_have_infinite_settings(recording: Recording) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (recording.folder / "index.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    assert content["scheduler_config"]["lambda_min_clipped"] == "-Infinity"


@pytest.mark.parametrize(("step", "start", "stop"), [(-1, 0, 1), (3, 0, 1), (0, 0, 4), (0, 2, 2), (0, -1, 1)])
def test_what_was_not_recorded_is_refused(recording: Recording, step: int, start: int, stop: int) -> None:
    with pytest.raises(CalibrationError, match="no such"):
        recording.calls(step, start, stop)


def test_expect_names_what_differs(recording: Recording) -> None:
    recording.expect(steps=3, guidance=4.0, height=64, scheduler="DPMSolverMultistepScheduler", seeds=[11, 12, 13])
    with pytest.raises(CalibrationError, match="of another steps; got 3, expected 20"):
        recording.expect(guidance=4.0, steps=20)
    with pytest.raises(CalibrationError, match="of another model"):
        recording.expect(model="0123")


@pytest.mark.parametrize("name", ["index.json", "shard-00000.safetensors", "shard-00001.safetensors"])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.99])
def test_one_flipped_bit_is_found(folder: Path, name: str, where: float) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CalibrationError):
        Recording.open(folder)


@pytest.mark.parametrize("name", ["index.json", "shard-00001.safetensors"])
def test_truncated_and_missing_files_are_found(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CalibrationError, match=name):
        Recording.open(folder, verify=False)
    path.unlink()
    with pytest.raises(CalibrationError, match=name):
        Recording.open(folder, verify=False)


def test_a_file_cut_after_opening_is_told(folder: Path) -> None:
    opened = Recording.open(folder)
    (folder / "shard-00001.safetensors").write_bytes(b"")
    with pytest.raises(CalibrationError, match="cannot be read"):
        opened.fed("vae")


def test_shard_of_another_shape_is_refused_by_its_header(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors["cond"] = tensors["cond"][:2]
    save_file(tensors, path)
    shards = [shard.model_dump() for shard in read_index(folder).shards]
    shards[1] |= {"sha256": file_digest(path), "bytes": path.stat().st_size}
    sign(folder, shards=shards)
    with pytest.raises(CalibrationError, match=r"tensor 'cond': wrong shape; got \[2, 1, 4, 8, 8\], expected \[3, 1\]"):
        Recording.open(folder)


def test_shard_names_cannot_leave_the_folder(folder: Path) -> None:
    text = (folder / "index.json").read_text().replace("shard-00001.safetensors", "../shard-00001.safetensors")
    (folder / "index.json").write_text(text)
    with pytest.raises(CalibrationError, match=r"not a recording's index; got .* at 'shards\.1\.file'"):
        Recording.open(folder)


def test_symbolic_links_are_not_followed(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")
    with pytest.raises(CalibrationError, match="missing"):
        Recording.open(folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 1}', "\x00", "[" * 10_000, '{"version": 2, "extra": 1}'],
)
def test_hostile_index_is_refused(folder: Path, content: str) -> None:
    (folder / "index.json").write_text(content)
    with pytest.raises(CalibrationError, match="not a recording's index"):
        Recording.open(folder)


@pytest.mark.parametrize("change", [{"start": 1}, {"start": 0}, {"count": 2}])
def test_shards_must_follow_one_another(folder: Path, change: dict[str, int]) -> None:
    content = json.loads((folder / "index.json").read_text())
    content["shards"][1] |= change
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="shards do not follow one another"):
        Recording.open(folder)


def test_changed_prompt_changes_the_digest(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text().replace("a red circle", "a tan circle"))
    with pytest.raises(CalibrationError, match="changed since it was written"):
        Recording.open(folder)


def test_shards_are_plain_safetensors(recording: Recording) -> None:
    with safe_open(recording.folder / "shard-00000.safetensors", framework="numpy") as file:
        assert set(file.keys()) >= {
            "sample",
            "cond",
            "uncond",
            "guided",
            "given.encoder_hidden_states",
            "fed.vae.latent_sample",
            "images",
        }
