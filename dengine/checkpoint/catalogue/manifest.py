"""What complete checkpoints a folder holds: `manifest.json`, and how it is rebuilt from the files themselves.

The files are the truth: each says at its end what it is (disk/footer.py). The manifest is their index, for people and
for tools, and tells what was there if a file is lost. A run killed between the rename of a file and that of the
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

from dengine.checkpoint.disk.footer import Footer, check_footer, read_footer
from dengine.checkpoint.disk.regular import open_regular, read_regular
from dengine.checkpoint.formats.sharded.files import read_metadata
from dengine.checkpoint.formats.sharded.verify import holds_shards, is_shard_folder, read_outline, verify_shards
from dengine.errors import CorruptCheckpointError

__all__ = [
    "FILE_NAME",
    "Entry",
    "Scan",
    "about",
    "entry_of",
    "from_footer",
    "from_name",
    "listed_beside",
    "listing",
    "manifest_text",
    "refuse_other",
    "scan",
]

FILE_NAME = "manifest.json"
_FORMAT = 1
_MOST_BYTES = 64 << 20  # of a manifest: some 100 000 checkpoints
_SHA256 = re.compile(r"[0-9a-f]{64}")
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
        writer: the host, the process, and which of its `Checkpoint`s it was; "" by hand.
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
    writer: str = ""


@dataclass(frozen=True)
class Scan:
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
        return from_footer(read_outline(path), path)
    with open_regular(path) as file:
        return from_footer(check_footer(file, path) if proven else read_footer(file, path), path)


def from_footer(footer: Footer, path: Path) -> Entry:
    """
    Raises:
        CorruptCheckpointError: the description lacks something, or is of a later format.
    """
    try:
        return _parsed({**footer.about, "name": path.name, "sha256": footer.sha256, "num_bytes": footer.num_bytes})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptCheckpointError(
            f"{path} has a damaged description, or one of a later dengine: {error!r}."
        ) from None


def scan(folder: Path) -> Scan:
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
            entry = entry_of(path)
            refuse_other(entry, listed.get(path.name), path)
            entries.append(entry)
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
    entries.sort(key=_order)
    damaged.sort(key=_order)
    return Scan(tuple(entries), tuple(damaged), lost, tuple(unknown), listed, problem)


def _is_candidate(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    try:
        return path.is_file() if path.suffix == ".pt" else is_shard_folder(path)
    except OSError:
        return from_name(path) is not None


def listed_beside(path: Path) -> Entry | None:
    """What the manifest in the folder of `path` has of it; None where it does not list it, or cannot be read."""
    return _listed(path.parent)[0].get(path.name)


def _seems_to_hold_shards(path: Path) -> bool:
    try:
        return holds_shards(path)
    except OSError:
        return False


def refuse_other(entry: Entry, listed: Entry | None, path: Path) -> None:
    """Refuse a whole file that is not the one which was saved under its name: an older one, say, that was copied over
    it. One that was saved again under its name, by a run that was killed before it could list that, is newer.

    Raises:
        CorruptCheckpointError: it is another one than the manifest has `listed`.
    """
    if listed is None or entry.sha256 == listed.sha256:
        return
    is_same_name = (entry.prefix, entry.step, entry.score_name) == (listed.prefix, listed.step, listed.score_name)
    if not is_same_name or entry.sequence <= listed.sequence:
        if path.is_dir():
            read_metadata(path)  # damage is told as such
        raise CorruptCheckpointError(
            f"{path} is another file than was saved under this name: it is whole, of step {entry.step} and the "
            f"{entry.sequence}. save into its folder, but the manifest lists step {listed.step}, the "
            f"{listed.sequence}. save, of another digest. To use it all the same, give it a name that is not listed."
        )


def listing(folder: Path, new: Sequence[Entry], dropped: Collection[str], seen: Scan | None = None) -> list[Entry]:
    """What the next manifest lists: what was listed and is there, whole files that were not, and `new`, oldest first.
    What was `seen` in the folder before counts, unless something else has written a manifest since.

    Files that were not listed are read whole, so that the manifest names only what is proven; that happens after a
    kill, or where the manifest was lost, of which a warning tells.
    """
    is_same = seen is not None and seen.problem is None and _listed(folder) == (seen.listed, None)
    found = seen if seen is not None and is_same else scan(folder)
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
        text = read_regular(folder / FILE_NAME, b"{", _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except (OSError, ValueError) as error:
        return {}, f"cannot be read ({type(error).__name__}: {error})"
    try:
        manifest = json.loads(text)
        files = manifest["files"]
        if manifest["sha256"] != _digest(files) or manifest["format"] != _FORMAT:
            return {}, "does not fit its digest"
        return {name: _parsed({**each, "name": name, "num_bytes": each["bytes"]}) for name, each in files.items()}, None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        return {}, f"cannot be read ({type(error).__name__})"


def _parsed(values: Mapping[str, Any]) -> Entry:
    if values["format"] != _FORMAT:
        raise ValueError(f"format {values['format']}, but this dengine reads {_FORMAT}")
    step, score, score_name = values["step"], values["score"], values["score_name"]
    sha256 = _text(values, "sha256")
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 {sha256[:80]!r}")
    return Entry(
        name=os.path.basename(_text(values, "name")),
        prefix=_text(values, "prefix"),
        step=None if step is None else _number(values, "step"),
        score=None if score is None else _score(score),
        score_name=None if score_name is None else _text(values, "score_name"),
        sequence=_number(values, "sequence"),
        objects=_texts(values["objects"]),
        world_size=_number(values, "world_size"),
        versions=_versions(values["versions"]),
        sha256=sha256,
        num_bytes=_number(values, "num_bytes"),
        writer=_text(values, "writer") if "writer" in values else "",
    )


def _number(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{key} {str(value)[:80]}")
    return value


def _score(value: Any) -> float:
    """Of JSON, which knows no infinity: there it is text."""
    if type(value) not in (int, float, str):
        raise ValueError(f"score {str(value)[:80]}")
    return float(value)


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise ValueError(f"{key} {str(values[key])[:80]}")
    return str(values[key])


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise ValueError(f"{str(values)[:80]} in the place of a list of names")
    return tuple(values)


def _versions(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(each, str) for each in values.values()):
        raise ValueError(f"{str(values)[:80]} in the place of versions")
    return {str(key): value for key, value in values.items()}


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
