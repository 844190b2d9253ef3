"""What complete checkpoints a folder holds: `manifest.json`, and how it is rebuilt from the files themselves.

The files are the truth: each says at its end what it is (seal.py). The manifest is their index, for people and for
tools, and tells what was there where a file is lost. A run killed between the rename of a file and that of the
manifest leaves a whole file that is not listed: it is found all the same.
"""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dengine.checkpoint.seal import Seal, check_seal, read_seal
from dengine.checkpoint.shard_verify import holds_shards, is_shard_folder, read_outline, verify_shards
from dengine.errors import CorruptCheckpointError

__all__ = [
    "FILE_NAME",
    "Entry",
    "Survey",
    "about",
    "entry_of",
    "from_name",
    "from_seal",
    "listing",
    "manifest_text",
    "survey",
]

FILE_NAME = "manifest.json"
_FORMAT = 1
_STEP_IN_NAME = re.compile(r"(?P<prefix>.+?)_(?P<step>\d+)(_(?P<score_name>.+)=(?P<score>[^=]+))?")


@dataclass(frozen=True)
class Entry:
    """One complete checkpoint: a file, or a folder that all ranks have written.

    Attributes:
        name: of the file or folder, in the folder of checkpoints.
        prefix, score_name: whose it is: a `Checkpoint` prunes only those with both of its own.
        step: None where it was saved by hand, under a name that tells none.
        score: None where the newest are kept rather than the best.
        sequence: counts the saves into the folder: the order in time, also after a restart from an earlier step.
        objects: the names that were saved.
        versions: of dengine and torch, that wrote it.
        sha256: of the file without its last 64 bytes, which say the same; of a folder's `metadata.json`, which has the
            digests of all its other files.
        num_bytes: of the file, or of all files in the folder.
    """

    name: str
    prefix: str
    step: int | None
    score: float | None
    score_name: str | None
    sequence: int
    objects: tuple[str, ...]
    world_size: int
    versions: dict[str, str] = field(hash=False)
    sha256: str = ""
    num_bytes: int = 0


@dataclass(frozen=True)
class Survey:
    """What a folder holds. `entries`: those with a readable end, oldest first, their bytes not proven yet.
    `damaged`: files with a checkpoint's name and an unreadable end; `lost`: listed, but not there.
    `unknown`: names of `*.pt` files and folders of shards with an unreadable end, of which nothing tells the prefix.
    `listed`: name -> entry, of the manifest. `problem`: what is wrong with the manifest, or None."""

    entries: tuple[Entry, ...]
    damaged: tuple[Entry, ...]
    lost: tuple[Entry, ...]
    unknown: tuple[str, ...]
    listed: dict[str, Entry]
    problem: str | None

    @property
    def has_any(self) -> bool:
        return bool(self.entries or self.damaged or self.lost or self.unknown)

    @property
    def next_sequence(self) -> int:
        return 1 + max((entry.sequence for entry in (*self.entries, *self.listed.values())), default=0)


def about(entry: Entry) -> dict[str, Any]:
    """What a file says of itself: the entry without what only the finished file has."""
    values = asdict(entry)
    for key in ("name", "sha256", "num_bytes"):
        del values[key]
    # JSON knows no infinity.
    values["score"] = entry.score if entry.score is None or math.isfinite(entry.score) else str(entry.score)
    return {"format": _FORMAT, **values}


def entry_of(path: Path, *, proven: bool = False) -> Entry:
    """The entry of a file, from its end, or of a folder; with `proven`, all bytes are read and checked too.

    Raises:
        CorruptCheckpointError: it is not what it says. OSError: it cannot be read.
        ValueError: a folder of another format, or of a machine with another byte order; with `proven` only.
    """
    if path.is_dir():
        if proven:
            verify_shards(path)
        return from_seal(read_outline(path), path)
    with open(path, "rb") as file:
        return from_seal(check_seal(file, path) if proven else read_seal(file, path), path)


def from_seal(seal: Seal, path: Path) -> Entry:
    """
    Raises:
        CorruptCheckpointError: the description lacks something, or is of a later format.
    """
    try:
        return _parsed({**seal.about, "name": path.name, "sha256": seal.sha256, "num_bytes": seal.num_bytes})
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{path} has a damaged description, or one of a later dengine: {error!r}."
        ) from None


def survey(folder: Path) -> Survey:
    """What `folder` holds. Cost: the manifest, the end of each `*.pt` file, each folder's `metadata.json`.

    Raises:
        OSError: the folder cannot be read; one that is not there holds nothing.
    """
    listed, problem = _listed(folder)
    entries: list[Entry] = []
    damaged: list[Entry] = []
    unknown: list[str] = []
    paths = sorted(path for path in folder.iterdir() if _is_candidate(path)) if folder.is_dir() else []
    for path in paths:
        try:
            entries.append(entry_of(path))
        except FileNotFoundError:  # pruned at this moment
            continue
        except CorruptCheckpointError:
            known = listed.get(path.name) or from_name(path)
            if known is not None:
                damaged.append(known)
            elif path.suffix == ".pt" or holds_shards(path):
                unknown.append(path.name)
    there = {path.name for path in paths}
    lost = tuple(entry for name, entry in listed.items() if name not in there)
    if problem is None and not listed and entries:
        problem = "is missing"
    entries.sort(key=_order)
    damaged.sort(key=_order)
    return Survey(tuple(entries), tuple(damaged), lost, tuple(unknown), listed, problem)


def _is_candidate(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.is_file() if path.suffix == ".pt" else is_shard_folder(path)


def listing(folder: Path, new: Sequence[Entry], dropped: Collection[str]) -> list[Entry]:
    """What the next manifest lists: what was listed and is there, whole files that were not, and `new`, oldest first.

    Files that were not listed are read whole, so that the manifest names only what is proven; that happens after a
    kill, or where the manifest was lost, of which a warning tells.
    """
    found = survey(folder)
    if found.problem is not None:
        warnings.warn(f"{folder / FILE_NAME} {found.problem}: it is rebuilt from the intact files.", stacklevel=2)
    taken = {entry.name for entry in new}
    kept = list(new)
    for entry in found.entries:
        if entry.name in dropped or entry.name in taken:
            continue
        if entry == found.listed.get(entry.name) or _is_intact(folder / entry.name):
            kept.append(entry)
    return sorted(kept, key=_order)


def manifest_text(entries: Sequence[Entry]) -> bytes:
    """The manifest that lists `entries`, with a digest of its own."""
    files = {entry.name: {**about(entry), "sha256": entry.sha256, "bytes": entry.num_bytes} for entry in entries}
    return (json.dumps({"format": _FORMAT, "files": files, "sha256": _digest(files)}, indent=2) + "\n").encode()


def _listed(folder: Path) -> tuple[dict[str, Entry], str | None]:
    """The manifest's entries by name, and what is wrong with it."""
    try:
        text = (folder / FILE_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    try:
        manifest = json.loads(text)
        files = manifest["files"]
        if manifest["sha256"] != _digest(files) or manifest["format"] != _FORMAT:
            return {}, "does not fit its digest"
        return {name: _parsed({**each, "name": name, "num_bytes": each["bytes"]}) for name, each in files.items()}, None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return {}, f"cannot be read ({type(error).__name__})"


def _parsed(values: Mapping[str, Any]) -> Entry:
    if values["format"] != _FORMAT:
        raise ValueError(f"format {values['format']}, but this dengine reads {_FORMAT}")
    step, score = values["step"], values["score"]
    return Entry(
        name=os.path.basename(str(values["name"])),
        prefix=str(values["prefix"]),
        step=None if step is None else int(step),
        score=None if score is None else float(score),
        score_name=None if values["score_name"] is None else str(values["score_name"]),
        sequence=int(values["sequence"]),
        objects=tuple(str(name) for name in values["objects"]),
        world_size=int(values["world_size"]),
        versions={str(key): str(value) for key, value in values["versions"].items()},
        sha256=str(values["sha256"]),
        num_bytes=int(values["num_bytes"]),
    )


def from_name(path: Path) -> Entry | None:
    """What the name of a file or folder alone tells; None where it is no checkpoint's."""
    match = _STEP_IN_NAME.fullmatch(path.name.removesuffix(".pt"))
    if match is None:
        return None
    try:
        score = None if match["score"] is None else float(match["score"])
    except ValueError:
        return None
    return Entry(path.name, match["prefix"], int(match["step"]), score, match["score_name"], -1, (), 0, {})


def _is_intact(path: Path) -> bool:
    try:
        entry_of(path, proven=True)
    except (CorruptCheckpointError, OSError, ValueError):
        return False
    return True


def _digest(files: object) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _order(entry: Entry) -> tuple[int, int, str]:
    return entry.sequence, -1 if entry.step is None else entry.step, entry.name
