"""Artifacts: whole or not at all, and never trusted after a change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.artifact import MANIFEST, link_tree, locked, open_artifact, reusable, write_artifact
from exporter.errors import ArtifactError, ComponentFailed
from exporter.memo import FileMemo


def build(folder: Path) -> dict[str, object]:
    (folder / "unet").mkdir()
    (folder / "unet" / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "index.json").write_text('{"a": 1}')
    return {"parameters": 3}


def make(folder: Path, key: str = "k1") -> Path:
    write_artifact(folder, build, kind="state", key=key, parent=None, made={"when": time.time()})
    return folder


def test_equal_content_has_an_equal_digest_whatever_the_time(tmp_path: Path) -> None:
    first = open_artifact(make(tmp_path / "a" / "0-dense"))
    second = open_artifact(make(tmp_path / "b" / "0-dense"))
    assert first.digest == second.digest
    assert first.part_digest("unet") == second.part_digest("unet")


@pytest.mark.parametrize("name", ["unet/weights.bin", "index.json", MANIFEST])
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "0-dense")
    file = folder / name
    good = file.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 23)):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(ArtifactError):
            open_artifact(folder)
        assert reusable(folder, "k1") is None
    file.write_bytes(good)
    assert open_artifact(folder).manifest.facts == {"parameters": 3}


def test_a_truncated_missing_or_added_file_is_found_without_hashing(tmp_path: Path) -> None:
    folder = make(tmp_path / "0-dense")
    memo = FileMemo()
    open_artifact(folder, memo=memo)
    hashed = list(memo.read)
    (folder / "stray").write_text("x")
    with pytest.raises(ArtifactError, match="not part of the artifact"):
        open_artifact(folder, memo=memo)
    (folder / "stray").unlink()
    os.truncate(folder / "unet" / "weights.bin", 100)
    with pytest.raises(ArtifactError, match="got 100 bytes, expected 10240"):
        open_artifact(folder, memo=memo)
    (folder / "unet" / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        open_artifact(folder, memo=memo)
    assert memo.read == hashed


def test_a_change_that_keeps_the_size_is_found_because_the_time_differs(tmp_path: Path) -> None:
    folder = make(tmp_path / "0-dense")
    memo = FileMemo()
    assert reusable(folder, "k1", memo) is not None
    (folder / "index.json").write_text('{"a": 2}')
    with pytest.raises(ArtifactError, match="sha256"):
        open_artifact(folder, memo=memo)


def rewrite(folder: Path, **changes: object) -> None:
    """Forge a manifest: its own checksums are made right, as an attacker would."""
    from exporter.artifact import Manifest, _content_digest, digest_of

    data = json.loads((folder / MANIFEST).read_text()) | changes | {"checksum": ""}
    manifest = Manifest.model_validate(data)
    manifest = manifest.model_copy(update={"digest": _content_digest(manifest)})
    manifest = manifest.model_copy(update={"checksum": digest_of(manifest.model_dump())})
    (folder / MANIFEST).write_text(manifest.model_dump_json())


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../secret", "a//b", "", ".", "~/x", "a\n", "a\\..\\b"]
)
def test_a_path_that_leaves_the_artifact_is_refused(tmp_path: Path, path: str) -> None:
    folder = make(tmp_path / "0-dense")
    (tmp_path / "secret").write_text("x")
    rewrite(folder, files={path: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(ArtifactError):
        open_artifact(folder)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "0-dense")
    data = (folder / "index.json").read_bytes()
    (tmp_path / "outside").write_bytes(data)
    (folder / "index.json").unlink()
    (folder / "index.json").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="symbolic link"):
        open_artifact(folder)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"schema_version": 99}', "[" * 100_000, "\x00\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "0-dense")
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError):
        open_artifact(folder)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="got 'state', expected 'engine'"):
        open_artifact(make(tmp_path / "x"), kind="engine")


def test_a_failing_build_leaves_the_finished_artifact_and_no_rubbish(tmp_path: Path) -> None:
    folder = make(tmp_path / "0-dense")
    before = open_artifact(folder).digest

    def full(partial: Path) -> dict[str, object]:
        build(partial)
        raise OSError(28, "No space left on device")

    with pytest.raises(ComponentFailed, match="No space left"):
        write_artifact(folder, full, kind="state", key="k2", parent=None)
    assert open_artifact(folder).digest == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["0-dense"]


def test_replacing_swaps_only_when_complete(tmp_path: Path) -> None:
    folder = make(tmp_path / "0-dense")
    make(folder, key="k2")
    assert reusable(folder, "k1") is None
    assert reusable(folder, "k2") is not None


def test_links_share_the_bytes_and_leave_the_manifest(tmp_path: Path) -> None:
    folder = make(tmp_path / "0-dense")
    link_tree(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "index.json").stat().st_ino == (folder / "index.json").stat().st_ino
    assert not (tmp_path / "copy" / MANIFEST).exists()


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from exporter.artifact import locked\n"
        "with locked(Path(sys.argv[1])):\n  print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"held"
    with pytest.raises(ArtifactError, match=f"process {holder.pid}"), locked(tmp_path / "out"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with locked(tmp_path / "out"):
        pass  # a killed holder holds nothing


def test_leftovers_of_a_kill_are_cleared_and_a_half_done_swap_is_undone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = make(out / "states" / "0-dense")
    digest = open_artifact(folder).digest
    folder.rename(folder.parent / ".trash-0-dense-123")
    (out / "states" / ".partial-1-pruned-123").mkdir()
    shutil.copytree(out / "states" / ".trash-0-dense-123", out / "states" / ".partial-0-dense-9" / "x")
    with locked(out):
        assert open_artifact(folder).digest == digest
        assert not [item for item in (out / "states").iterdir() if item.name.startswith((".partial", ".trash"))]


def test_a_file_that_several_artifacts_link_is_hashed_once(tmp_path: Path) -> None:
    memo = FileMemo()
    first = write_artifact(tmp_path / "a", build, kind="state", key="1", parent=None, memo=memo)

    def linked(folder: Path) -> dict[str, object]:
        link_tree(first.path, folder)
        return {}

    for name in ("b", "c"):
        made = write_artifact(
            tmp_path / name, linked, kind="engine", key="2", parent=None, sources=[first.path], memo=memo
        )
        assert made.manifest.files == first.manifest.files
    for name in "abc":
        assert reusable(tmp_path / name, "2" if name != "a" else "1", memo) is not None
    assert sorted(path.name for path in memo.read) == ["index.json", "weights.bin"]
    write_artifact(tmp_path / "c", build, kind="engine", key="3", parent=None, memo=memo)  # takes links away
    read = len(memo.read)
    open_artifact(tmp_path / "b", memo=memo)
    assert len(memo.read) == read
