"""The description of one checkpoint, which is at the end of its file, and in the manifest."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dengine.checkpoint.disk.footer import Footer
from dengine.errors import CorruptCheckpointError

__all__ = ["FORMAT", "Entry", "about", "entries_of", "from_footer", "from_name", "listing"]

FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEP_IN_NAME = re.compile(r"(?P<prefix>.+?)_(?P<step>\d+)(_(?P<score_name>.+)=(?P<score>[^=]+))?")


@dataclass(frozen=True)
class Entry:
    """One complete checkpoint: a file, or a folder that all ranks have written.

    Attributes:
        name: of the file or folder, in the folder of checkpoints.
        prefix, score_name: the owner: a `Checkpoint` prunes only entries with its own prefix and score name.
        step: None if the name under which it was saved has none.
        score: None if the newest are kept rather than the best.
        sequence: the number of the save in this folder: the order in time, also after a restart from an earlier step.
        objects: the names that were saved.
        versions: the versions of dengine and torch that wrote it.
        sha256: of the file without its last 64 bytes, which are this digest; for a folder, of its `metadata.json`,
            which has the digests of all other files.
        num_bytes: of the file, or of all files in the folder.
        writer: the host, the process, and the number of the `Checkpoint` in it; "" for `checkpoint.save`.
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


def listing(entries: Iterable[Entry]) -> dict[str, dict[str, object]]:
    """The part of a manifest that lists `entries`, by name."""
    return {entry.name: {**about(entry), "sha256": entry.sha256, "bytes": entry.num_bytes} for entry in entries}


def entries_of(files: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries in `files` of a manifest.

    Raises:
        KeyError, TypeError, ValueError, OverflowError, AttributeError: they were changed, or are of a later format.
    """
    return {name: _parsed({**each, "name": name, "num_bytes": each["bytes"]}) for name, each in files.items()}


def about(entry: Entry) -> dict[str, object]:
    """The description at the end of a file: the entry without the values that only the finished file has."""
    values = dict(vars(entry))
    for key in ("name", "sha256", "num_bytes"):
        del values[key]
    # JSON knows no infinity.
    values["score"] = entry.score if entry.score is None or math.isfinite(entry.score) else str(entry.score)
    return {"format": FORMAT, **values}


def from_footer(footer: Footer, path: Path) -> Entry:
    """The entry in a file's footer.

    Raises:
        CorruptCheckpointError: the description lacks something, or is of a later format.
    """
    try:
        return _parsed({**footer.about, "name": path.name, "sha256": footer.sha256, "num_bytes": footer.num_bytes})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptCheckpointError(
            f"{path} has a damaged description, or one of a later dengine: {error!r}."
        ) from None


def from_name(path: Path) -> Entry | None:
    """The entry that the name of a file or folder alone gives; None if it is not a checkpoint's name."""
    match = _STEP_IN_NAME.fullmatch(path.name.removesuffix(".pt"))
    if match is None:
        return None
    try:
        score = None if match["score"] is None else float(match["score"])
    except ValueError:
        return None
    return Entry(path.name, match["prefix"], int(match["step"]), score, match["score_name"], -1, (), 0, {})


def _parsed(values: Mapping[str, Any]) -> Entry:
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']}, but this dengine reads {FORMAT}")
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
    """A score from JSON, in which infinity is text."""
    if type(value) not in (int, float, str):
        raise ValueError(f"score {str(value)[:80]}")
    return float(value)


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise ValueError(f"{key} {str(values[key])[:80]}")
    return str(values[key])


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise ValueError(f"{str(values)[:80]} instead of a list of names")
    return tuple(values)


def _versions(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(each, str) for each in values.values()):
        raise ValueError(f"{str(values)[:80]} instead of versions")
    return {str(key): value for key, value in values.items()}
