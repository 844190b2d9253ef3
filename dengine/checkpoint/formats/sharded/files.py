"""The files of a sharded checkpoint: raw bytes of tensors, and documents, which say what they are.

No collective. Everything that is read is compared with its SHA-256 before it is used; nothing is executed.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dengine.checkpoint.disk.hashing import HashingWriter
from dengine.checkpoint.disk.regular import open_regular, read_regular
from dengine.checkpoint.formats.sharded.boxes import TensorBox
from dengine.checkpoint.formats.sharded.tree import Node
from dengine.dtensor import local_part
from dengine.errors import CorruptCheckpointError

__all__ = [
    "FILE_NAME",
    "METADATA",
    "TABLE_NAME",
    "Chunk",
    "InvalidDeclarationError",
    "Metadata",
    "Written",
    "as_corrupt",
    "checked_chunk",
    "number",
    "parsed",
    "read_body",
    "read_whole",
    "write_body",
    "write_metadata",
    "write_tensors",
]

METADATA = "metadata.json"
FORMAT_VERSION = 1
_START = b'{"body":'
_MOST_BYTES = 4 << 30  # of metadata.json: some 10 000 ranks

FILE_NAME = re.compile(r"rank_\d{5,}\.bin")  # nothing that leads out of the folder
TABLE_NAME = re.compile(r"rank_\d{5,}\.json")


class InvalidDeclarationError(CorruptCheckpointError, ValueError):
    """The declarations of a folder are impossible, or are for another version of torch."""


@dataclass(frozen=True)
class Chunk:
    """The location of a part of a tensor: `num_bytes` of `file` from byte `start` on, row by row."""

    file: str
    start: int
    num_bytes: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Written:
    """The file that a rank has written, and the parts of tensors in it, by the tensors' names; no file if there are
    none."""

    file: str
    num_bytes: int
    sha256: str
    chunks: dict[str, Chunk]


@dataclass(frozen=True)
class Metadata:
    """What a document says: the states as a tree (tree.py), the parts of each tensor, each file's length and digest.
    That of a lone rank is `metadata.json`; of several, each has one of its own, with what that rank has written."""

    states: Node
    chunks: dict[str, list[Chunk]]
    files: dict[str, tuple[int, str]]
    world_size: int
    about: dict[str, object]


# -- writing -----------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], boxes: Mapping[str, TensorBox]) -> Written:
    """Write this rank's part of `tensors` one after another, down to the disk.

    Raises:
        OSError: the file cannot be written.
    """
    if not tensors:
        return Written(path.name, 0, "", {})
    chunks: dict[str, Chunk] = {}
    start = 0
    num_bytes = sum(local_part(tensor).nbytes for tensor in tensors.values())
    with open(path, "xb", buffering=0) as file:
        with HashingWriter(file.fileno(), num_bytes) as written:
            for name, tensor in tensors.items():
                content = _bytes_of(local_part(tensor))
                written.write(content)
                # A second digest, of the part alone, so that a reader checks only the parts that it reads.
                digest = hashlib.sha256(content).hexdigest()
                offsets, sizes = boxes[name].offsets, boxes[name].sizes or ()
                chunks[name] = Chunk(path.name, start, len(content), offsets, sizes, digest)
                start += len(content)
            whole = written.digest()
        os.fsync(file.fileno())
    return Written(path.name, start, whole, chunks)


def write_metadata(
    path: Path, states: Node, written: Written, num_ranks: int, about: Mapping[str, object] | None = None
) -> tuple[int, str]:
    """Write a document down to the disk: the `states`, what was `written`, and what is said `about` the whole. Its
    length and digest.

    Raises:
        OSError: it cannot be written.
    """
    files = {written.file: {"num_bytes": written.num_bytes, "sha256": written.sha256}} if written.chunks else {}
    return write_body(
        path,
        {
            "about": dict(about or {}),
            "format": FORMAT_VERSION,
            "world_size": num_ranks,
            "files": files,
            "states": states,
            "chunks": {name: [asdict(chunk)] for name, chunk in written.chunks.items()},
        },
    )


def write_body(path: Path, body: Mapping[str, Any]) -> tuple[int, str]:
    """Write `body`, which says its format, with what it takes to read its numbers, and its digest."""
    raw = _rendered({**body, "byteorder": sys.byteorder, "torch": torch.__version__})
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return len(raw), hashlib.sha256(raw).hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------


def read_body(path: Path) -> dict[str, Any]:
    """What stands in a document, whose own digest fits.

    Raises:
        CorruptCheckpointError: it is missing or was changed. OSError: it cannot be read.
    """
    with as_corrupt(path):
        raw = read_whole(path)
        body = json.loads(raw)["body"]
        # Every byte counts: equal content in another notation was changed, too.
        if _rendered(body) != raw:
            raise ValueError("its digest does not fit")
        if not isinstance(body, dict):
            raise TypeError("it holds no dict")
        return body


def parsed(body: Mapping[str, Any], path: Path) -> Metadata:
    """What `write_metadata` has written.

    Raises:
        CorruptCheckpointError: something in it cannot be. ValueError: it is of another format, or of a machine with
            another byte order.
    """
    if body.get("format") != FORMAT_VERSION or body.get("byteorder") != sys.byteorder:
        raise ValueError(
            f"{path} is of format {body.get('format')!r} in {body.get('byteorder')}-endian order, but this version "
            f"reads format {FORMAT_VERSION} in {sys.byteorder}-endian order."
        )
    with as_corrupt(path):
        files = body["files"].items()
        return Metadata(
            states=body["states"],
            chunks={name: [_chunk(one) for one in parts] for name, parts in body["chunks"].items()},
            files={_file_name(name): (number(one["num_bytes"]), str(one["sha256"])) for name, one in files},
            world_size=number(body["world_size"]),
            about=dict(body["about"]),
        )


def read_whole(path: Path) -> bytes:
    """A document, not checked.

    Raises:
        CorruptCheckpointError: it is missing. OSError: it cannot be read. ValueError: it begins otherwise, or is huge.
    """
    try:
        return read_regular(path, _START, _MOST_BYTES)
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing, so the rest of the folder cannot be read.") from None


def checked_chunk(folder: Path, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
    """A part of a tensor, on the CPU, after its digest was checked. Shapes: (*chunk.sizes).

    Raises:
        CorruptCheckpointError: the file is missing, too short, or was changed there.
    """
    path = folder / chunk.file
    content = bytearray(chunk.num_bytes)
    try:
        with open_regular(path) as file:
            file.seek(chunk.start)
            num_read = file.readinto(content)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error
    if num_read != chunk.num_bytes:
        raise CorruptCheckpointError(f"{path} is too short: {chunk.num_bytes} bytes were expected at {chunk.start}.")
    if hashlib.sha256(content).hexdigest() != chunk.sha256:
        raise CorruptCheckpointError(f"{path} was changed within {chunk.num_bytes} bytes from byte {chunk.start} on.")
    if not content:
        return torch.empty(chunk.sizes, dtype=dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).reshape(chunk.sizes)


# -- helpers -----------------------------------------------------------------------------------------------------


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements row by row, on the host. No copy if they are there in this order already."""
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data


def _rendered(body: Mapping[str, Any]) -> bytes:
    """`body` and its digest, in the only notation that is written."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f'{{"body":{text},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'.encode()


@contextmanager
def as_corrupt(path: Path) -> Iterator[None]:
    """A context that reports content of another form as a change of the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, RuntimeError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise InvalidDeclarationError(f"{path} was changed: {error}") from error


def _chunk(one: Mapping[str, Any]) -> Chunk:
    offsets, sizes = (tuple(map(number, one[name])) for name in ("offsets", "sizes"))
    start, num_bytes = number(one["start"]), number(one["num_bytes"])
    if len(offsets) != len(sizes):
        raise ValueError(f"{one} is no part of a tensor")
    return Chunk(_file_name(one["file"]), start, num_bytes, offsets, sizes, str(one["sha256"]))


def number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:80]} is no length or place")
    return value


def _file_name(name: str) -> str:
    if not FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a file of a rank")
    return name
