"""Artifacts: immutable directories with a manifest, written whole or not at all, and trusted only after a check.

A directory is built under a temporary name beside its final one, synced, and renamed when complete, so a kill or a full
disk never leaves half an artifact and never touches a finished one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from exporter.errors import ArtifactError, ComponentFailed, ExporterError
from exporter.memo import FileMemo

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_PARTIAL, _TRASH = ".partial-", ".trash-"
_MAX_MANIFEST_BYTES = 16 * 2**20
_SAFE_PATH = re.compile(r"[\w][\w.+@-]*(/[\w][\w.+@-]*)*")

Kind = Literal["state", "recording", "onnx", "compiled", "engine", "kit"]


class FileFact(BaseModel):
    """What a file of an artifact must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str
    size: int


class Manifest(BaseModel):
    """What an artifact is.

    Attributes:
        schema_version: version of this layout.
        kind: what sort of artifact.
        name: its name for people, such as ``1-pruned``.
        key: sha256 over everything it was made from; equal key and intact files mean: reuse.
        parent: digest of the artifact it was made from.
        files: relative posix path -> fact.
        facts: what the maker recorded; deterministic, part of the digest.
        made: when, how long, with which versions; not part of the digest.
        digest: identity of the content: sha256 over kind, name, parent, files and facts.
        checksum: sha256 over this manifest with an empty checksum, so that a flipped byte here is found too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int
    kind: Kind
    name: str
    key: str
    parent: str | None
    files: dict[str, FileFact]
    facts: dict[str, Any]
    made: dict[str, Any]
    digest: str
    checksum: str


@dataclass(frozen=True)
class Artifact:
    """A checked directory and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """Identity of the content, sha256 hex."""
        return self.manifest.digest

    def part_digest(self, folder: str, *, without: Collection[str] = ()) -> str:
        """Return the digest of one folder's files, so that what did not change is recognised across artifacts.

        Args:
            folder: of the artifact.
            without: names of files in it that do not count.
        """
        left_out = {f"{folder}/{name}" for name in without}
        inside = {
            name: fact.sha256
            for name, fact in self.manifest.files.items()
            if name.startswith(f"{folder}/") and name not in left_out
        }
        return digest_of([folder, inside])


def digest_of(value: object) -> str:
    """Return the sha256 hex of a JSON-ready value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_artifact(  # noqa: PLR0913 - what an artifact is
    final: Path,
    build: Callable[[Path], Mapping[str, Any]],
    *,
    kind: Kind,
    key: str,
    parent: str | None,
    made: Mapping[str, Any] | None = None,
    sources: Sequence[Path] = (),
    memo: FileMemo | None = None,
) -> Artifact:
    """Build an artifact beside `final` and rename it there when it is complete.

    Args:
        final: where it shall stand; an older artifact there is replaced in one rename, and only then deleted.
        build: fills the empty folder it is given and returns the facts.
        kind: what sort of artifact.
        key: see `Manifest.key`.
        parent: digest of the artifact it is made from.
        made: facts that must not enter the digest (time, versions).
        sources: folders whose files `build` may link.
        memo: what is known of files.

    Raises:
        ComponentFailed: the disk is full or not writable; nothing that was finished before is touched.
    """
    memo = memo or FileMemo()
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f"{_PARTIAL}{final.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with memo.relinking([file for folder in sources for file in _files_in(folder)]):
            facts = dict(build(partial))
        labels = {"kind": kind, "name": final.name, "key": key, "parent": parent, "made": dict(made or {})}
        _sync_tree(partial)
        manifest = _manifest_of(partial, labels, facts, memo)
        write_text(partial / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        _sync(partial)
        _swap(partial, final, memo)
    except OSError as error:
        raise disk_failure(final, error) from error
    finally:
        remove_tree(partial, memo, ignore_errors=True)
    return Artifact(final, manifest)


def open_artifact(path: Path, *, memo: FileMemo | None = None, kind: Kind | None = None) -> Artifact:
    """Check an artifact and return it.

    Args:
        path: its directory.
        memo: what is known of files; without one, every file is hashed.
        kind: refuse an artifact of another kind.

    Raises:
        ArtifactError: missing, damaged, truncated, escaping its folder, of another kind or from a newer version.
    """
    manifest = _read_manifest(path)
    if kind is not None and manifest.kind != kind:
        msg = (
            f"{path}: wrong kind of artifact; got '{manifest.kind}', expected '{kind}'. Give the folder of the {kind}."
        )
        raise ArtifactError(msg)
    _check_file_list(path, manifest)
    memo = memo or FileMemo()
    for name, fact in manifest.files.items():
        _check_file(path / name, fact, memo)
    return Artifact(path, manifest)


def kind_of(path: Path) -> Kind | None:
    """Return what sort of artifact a folder holds by its manifest, whose files are not looked at; None where none."""
    try:
        return _read_manifest(path).kind
    except ArtifactError:
        return None


def reusable(path: Path, key: str, memo: FileMemo | None = None) -> Artifact | None:
    """Return the artifact at `path` when it has this key and is intact, else None."""
    if not path.is_dir():
        return None
    try:
        if _read_manifest(path).key != key:  # before its files are looked at: of what is not asked for none is hashed
            return None
        return open_artifact(path, memo=memo)
    except ArtifactError:
        return None


def link_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def link_tree(source: Path, target: Path) -> None:
    """Link every file below `source` to the same place below `target`; manifests stay behind."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            link_file(path, target / path.relative_to(source))


def remove_tree(folder: Path, memo: FileMemo, *, ignore_errors: bool = False) -> None:
    """Remove a folder; files that live on under other names stay known."""
    with memo.relinking(_files_in(folder)):
        shutil.rmtree(folder, ignore_errors=ignore_errors)


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name, synced, so that readers see the old or the new, never a half."""
    temporary = path.parent / f"{_PARTIAL}{path.name}-{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def disk_failure(path: Path, error: OSError) -> ExporterError:
    """Return the error for a write that failed."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(_existing(path)).free / 1e6
        return ComponentFailed(
            f"{path}: could not be written: {reason}; {free:.0f} MB are free. Nothing finished was lost: free some "
            "space (`exporter gc OUT` removes what no state uses) and run the same command again."
        )
    place = error.filename or path
    return ComponentFailed(f"{place}: could not be read or written: {reason}. Check the path and its permissions.")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run folder alone; also clears what killed runs left half-written.

    Raises:
        ArtifactError: another process holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = (out / ".lock").open("a+")
    except OSError as error:
        raise disk_failure(out, error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            msg = (
                f"{out}: another run is writing into this folder; got process {holder}, expected none. "
                "Wait for it, or give another folder with --out."
            )
            raise ArtifactError(msg) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        _clear_leftovers(out)
        yield


def _clear_leftovers(out: Path) -> None:
    for depth in ("", "*/", "*/*/"):
        for path in list(out.glob(f"{depth}{_TRASH}*")):
            final = path.parent / path.name.removeprefix(_TRASH).rpartition("-")[0]
            if not final.exists():  # killed between the two renames of a swap: the older artifact comes back
                path.rename(final)
            else:
                shutil.rmtree(path, ignore_errors=True)
        for path in list(out.glob(f"{depth}{_PARTIAL}*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _manifest_of(folder: Path, labels: Mapping[str, Any], facts: dict[str, Any], memo: FileMemo) -> Manifest:
    files = {
        path.relative_to(folder).as_posix(): FileFact(sha256=memo.sha256(path), size=path.stat().st_size)
        for path in _files_in(folder)
    }
    facts = json.loads(json.dumps(facts))
    bare = Manifest(schema_version=SCHEMA_VERSION, files=files, facts=facts, digest="", checksum="", **labels)
    named = bare.model_copy(update={"digest": _content_digest(bare)})
    return named.model_copy(update={"checksum": digest_of(named.model_dump())})


def _content_digest(manifest: Manifest) -> str:
    hashes = {name: fact.sha256 for name, fact in manifest.files.items()}
    return digest_of([manifest.schema_version, manifest.kind, manifest.name, manifest.parent, hashes, manifest.facts])


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        msg = f"{path}: not an artifact; got no {MANIFEST}, expected one. Give a folder that `exporter run` wrote."
        raise ArtifactError(msg)
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        size = file.stat().st_size
        msg = f"{file}: too large; got {size} bytes, expected at most {_MAX_MANIFEST_BYTES}. Make it again."
        raise ArtifactError(msg)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            msg = f"{file}: made by a newer version; got schema {version}, expected at most {SCHEMA_VERSION}. Update."
            raise ArtifactError(msg)
        manifest = Manifest.model_validate(raw)
    except (ValueError, RecursionError) as error:
        reason = "fields that do not fit" if isinstance(error, ValidationError) else "no readable JSON"
        msg = f"{file}: damaged; got {reason}, expected a manifest. Delete the folder and run again."
        raise ArtifactError(msg) from error
    bare = manifest.model_copy(update={"checksum": ""})
    hashes = {name: fact.sha256 for name, fact in manifest.files.items()}
    digest = digest_of([manifest.schema_version, manifest.kind, manifest.name, manifest.parent, hashes, manifest.facts])
    if digest != manifest.digest or digest_of(bare.model_dump()) != manifest.checksum:
        msg = f"{file}: changed after it was written; its checksum does not fit. Delete the folder and run again."
        raise ArtifactError(msg)
    return manifest


def _check_file_list(path: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if not _SAFE_PATH.fullmatch(name) or ".." in PurePosixPath(name).parts:
            place = path / MANIFEST
            msg = f"{place}: a path leaves the artifact; got '{name[:200]}', expected a path inside. Do not use it."
            raise ArtifactError(msg)
    present = {item.relative_to(path).as_posix(): item for item in path.rglob("*") if not item.is_dir()}
    for name, item in present.items():
        if item.is_symlink():
            msg = f"{item}: a symbolic link inside an artifact; expected plain files only. Do not use it."
            raise ArtifactError(msg)
        if name not in manifest.files and name != MANIFEST:
            msg = f"{item}: not part of the artifact; expected only what {MANIFEST} lists. Remove the file."
            raise ArtifactError(msg)
    missing = sorted(set(manifest.files) - set(present))
    if missing:
        msg = f"{path / missing[0]}: missing; expected a file of this artifact. Delete the folder and run again."
        raise ArtifactError(msg)


def _check_file(file: Path, fact: FileFact, memo: FileMemo) -> None:
    size = file.stat().st_size
    if size != fact.size:
        msg = f"{file}: damaged; got {size} bytes, expected {fact.size}. Delete the folder and run again."
        raise ArtifactError(msg)
    got = memo.sha256(file)
    if got != fact.sha256:
        msg = f"{file}: damaged; got sha256 {got[:12]}, expected {fact.sha256[:12]}. Delete the folder and run again."
        raise ArtifactError(msg)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, final: Path, memo: FileMemo) -> None:
    trash = final.parent / f"{_TRASH}{final.name}-{os.getpid()}"
    if final.exists():
        final.rename(trash)
    partial.rename(final)
    _sync(final.parent)
    remove_tree(trash, memo, ignore_errors=True)
