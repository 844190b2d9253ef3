"""The list of complete checkpoints in a folder, `manifest.json`, which can be rebuilt from the files themselves.

The files are the truth: each has its description at its end (disk/footer.py). The manifest is an index for people and
tools, and remembers files that were lost. A run killed between the rename of a file and that of the manifest leaves a
complete file that is not listed: it is found all the same.
"""

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dengine.checkpoint.catalogue.entry import FORMAT, Entry, entries_of, from_footer, from_name, listing
from dengine.checkpoint.disk.footer import Footer, check_footer, read_footer
from dengine.checkpoint.disk.regular import open_regular, read_regular
from dengine.checkpoint.formats.sharded.saved import read_metadata
from dengine.checkpoint.formats.sharded.verify import holds_shards, is_shard_folder, read_outline, verify_shards
from dengine.errors import CorruptCheckpointError

__all__ = ["FILE_NAME", "Scan", "entry_of", "listed_beside", "next_manifest", "refuse_other", "scan"]

FILE_NAME = "manifest.json"
_MOST_BYTES = 64 << 20  # of a manifest: some 100 000 checkpoints


@dataclass(frozen=True)
class Scan:
    """The content of a folder of checkpoints.

    `entries`: checkpoints with a readable end, oldest first, whose bytes are not verified yet.
    `damaged`: files with a checkpoint's name and an unreadable end; `lost`: listed files that are not there.
    `unknown`: names of `*.pt` files and folders of shards with an unreadable end and an unknown prefix.
    `listed`: the entries of the manifest by name. `problem`: the problem of the manifest, or None. `text`: the manifest
    itself, or None.
    """

    entries: tuple[Entry, ...]
    damaged: tuple[Entry, ...]
    lost: tuple[Entry, ...]
    unknown: tuple[str, ...]
    listed: dict[str, Entry]
    problem: str | None
    text: bytes | None

    @property
    def has_any(self) -> bool:
        return bool(self.entries or self.damaged or self.lost or self.unknown)

    @property
    def next_sequence(self) -> int:
        return 1 + max((entry.sequence for entry in (*self.entries, *self.listed.values())), default=0)


def entry_of(path: Path, *, proven: bool = False) -> Entry:
    """The entry of a file, from its end, or of a folder; with `proven`, all bytes are read and verified, too.

    Raises:
        CorruptCheckpointError: it is damaged. OSError: it cannot be read.
        ValueError: with `proven` only: a folder of another format, or from a machine with another byte order.
    """
    return from_footer(_footer_of(path, proven=proven), path)


def _footer_of(path: Path, *, proven: bool = False) -> Footer:
    if path.is_dir():
        if proven:
            verify_shards(path)
        return read_outline(path)
    with open_regular(path) as file:
        return check_footer(file, path) if proven else read_footer(file, path)


def scan(folder: Path) -> Scan:
    """Scan `folder`. Cost: the manifest, the end of each `*.pt` file, each folder's `metadata.json`.

    Raises:
        OSError: the folder cannot be read. One that does not exist is empty.
    """
    manifest = _read(folder)
    listed, problem = manifest.entries, manifest.problem
    entries: list[Entry] = []
    damaged: list[Entry] = []
    unknown: list[str] = []
    paths = sorted(path for path in folder.iterdir() if _is_candidate(path)) if folder.is_dir() else []
    for path in paths:
        try:
            entries.append(_entry_as_listed(path, manifest))
        except FileNotFoundError:  # pruned at this moment
            continue
        except (CorruptCheckpointError, OSError):  # a folder that cannot be read is as a damaged file
            known = listed.get(path.name) or from_name(path)
            if known is not None:
                damaged.append(known)
            elif path.suffix == ".pt" or _seems_to_hold_shards(path):
                unknown.append(path.name)
    there = {path.name for path in paths}
    lost = tuple(entry for name, entry in listed.items() if name not in there)
    if problem is None and not listed and entries:
        problem = "is missing"
    entries.sort(key=_by_age)
    damaged.sort(key=_by_age)
    return Scan(tuple(entries), tuple(damaged), lost, tuple(unknown), listed, problem, manifest.text)


def _entry_as_listed(path: Path, manifest: "_Manifest") -> Entry:
    footer = _footer_of(path)
    values = {**footer.about, "sha256": footer.sha256, "bytes": footer.num_bytes}
    if values == manifest.values.get(path.name):
        return manifest.entries[path.name]
    entry = from_footer(footer, path)
    _refuse_other_than(manifest.entries.get(path.name), entry, path)
    return entry


def _is_candidate(path: Path) -> bool:
    if path.name.startswith(".") or path.name == FILE_NAME:
        return False
    try:
        return path.is_file() if path.suffix == ".pt" else is_shard_folder(path)
    except OSError:
        return from_name(path) is not None


def listed_beside(path: Path) -> Entry | None:
    """The entry of `path` in the manifest beside it; None if it is not listed, or the manifest cannot be read."""
    return _read(path.parent).entries.get(path.name)


def _seems_to_hold_shards(path: Path) -> bool:
    try:
        return holds_shards(path)
    except OSError:
        return False


def refuse_other(entry: Entry, path: Path) -> None:
    """Refuse a complete file that is not the one which the manifest beside it lists under its name.

    Raises:
        CorruptCheckpointError: it is another file.
    """
    _refuse_other_than(listed_beside(path), entry, path)


def _refuse_other_than(listed: Entry | None, entry: Entry, path: Path) -> None:
    """Refuse a complete file that is not the one saved under its name, such as an older file that was copied over it.

    A newer file is accepted: it was saved by a run that was killed before it could list it.

    Raises:
        CorruptCheckpointError: it is not the file that the manifest has `listed`.
    """
    if listed is None or entry.sha256 == listed.sha256:
        return
    is_same_name = (entry.prefix, entry.step, entry.score_name) == (listed.prefix, listed.step, listed.score_name)
    if not is_same_name or entry.sequence <= listed.sequence:
        if path.is_dir():
            read_metadata(path)  # reports damage first
        raise CorruptCheckpointError(
            f"{path} is another file than was saved under this name: it is complete, from step {entry.step} and save "
            "number "
            f"{entry.sequence} in its folder, but the manifest lists step {listed.step} and save number "
            f"{listed.sequence}, with "
            "another digest. To use it all the same, give it a name that is not listed."
        )


def next_manifest(folder: Path, new: Entry, dropped: Collection[str], seen: Scan | None = None) -> bytes:
    """The next manifest: listed files that exist, complete files that were not listed, and `new`, without `dropped`.

    They are ordered from the oldest. The scan `seen` is used, unless somebody has written a manifest since then.

    Files that were not listed are read completely, so that the manifest lists only verified ones; that happens after a
    kill, or if the manifest was lost, with a warning.
    """
    is_same = seen is not None and seen.problem is None and _text(folder) == seen.text
    found = seen if seen is not None and is_same else scan(folder)
    if found.problem is not None:
        warnings.warn(f"{folder / FILE_NAME} {found.problem}: it is rebuilt from the intact files.", stacklevel=2)
    entries = [new]
    for entry in found.entries:
        if entry.name in dropped or entry.name == new.name:
            continue
        if entry == found.listed.get(entry.name) or _is_intact(folder / entry.name):
            entries.append(entry)
    return _rendered(sorted(entries, key=_by_age))


def _rendered(entries: Iterable[Entry]) -> bytes:
    files = listing(entries)
    return (json.dumps({"format": FORMAT, "files": files, "sha256": _digest(files)}, indent=2) + "\n").encode()


@dataclass(frozen=True)
class _Manifest:
    """A manifest that was read: its text, the values and the entry of each file in it, and its problem."""

    text: bytes | None = None
    values: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    problem: str | None = None


def _text(folder: Path) -> bytes | None:
    """The bytes of the manifest of `folder`, unchecked; None if there is none, or it cannot be read."""
    try:
        return read_regular(folder / FILE_NAME, b"{", _MOST_BYTES)
    except (OSError, ValueError):
        return None


def _read(folder: Path) -> _Manifest:
    try:
        text = read_regular(folder / FILE_NAME, b"{", _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return _Manifest()
    except (OSError, ValueError) as error:
        return _Manifest(problem=f"cannot be read ({type(error).__name__}: {error})")
    try:
        manifest = json.loads(text)
        files = manifest["files"]
        if manifest["sha256"] != _digest(files) or manifest["format"] != FORMAT:
            return _Manifest(problem="does not fit its digest")
        entries = entries_of(files)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        return _Manifest(problem=f"cannot be read ({type(error).__name__})")
    return _Manifest(text, files, entries)


def _is_intact(path: Path) -> bool:
    try:
        entry_of(path, proven=True)
    except (CorruptCheckpointError, OSError, ValueError):
        return False
    return True


def _digest(files: object) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _by_age(entry: Entry) -> tuple[int, int, str]:
    return entry.sequence, -1 if entry.step is None else entry.step, entry.name
