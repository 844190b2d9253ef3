"""The files of a sharded checkpoint: raw bytes of tensors, and `metadata.json`, which says what they are.

No collective. What is read is compared with its SHA-256 before it is used; nothing of it is run.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dengine.atomic_files import sync
from dengine.checkpoint.disk.hashing import HashingWriter
from dengine.checkpoint.disk.regular import open_regular, read_regular
from dengine.checkpoint.formats.sharded.check import check_declared
from dengine.checkpoint.formats.sharded.tree import Node, dtype_name
from dengine.dtensor import is_dtensor, is_made_of_others, local_part
from dengine.errors import CorruptCheckpointError

__all__ = [
    "FILE_NAME",
    "METADATA",
    "Chunk",
    "MadeUpError",
    "Metadata",
    "TensorBox",
    "Written",
    "as_corrupt",
    "check_dense",
    "checked_chunk",
    "local_box",
    "read_metadata",
    "read_whole",
    "write_metadata",
    "write_tensors",
]

METADATA = "metadata.json"
FORMAT_VERSION = 1
_START = b'{"body":'
_MOST_BYTES = 4 << 30  # of metadata.json: some 10 000 ranks

FILE_NAME = re.compile(r"rank_\d{5,}\.bin")  # nothing that leads out of the folder


class MadeUpError(CorruptCheckpointError, ValueError):
    """What a folder says of itself cannot be, or not with this torch."""


@dataclass(frozen=True)
class TensorBox:
    """The part of a tensor that one rank holds: `sizes` elements from `offsets` on; None if it holds none of it."""

    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...] | None

    @property
    def num_elements(self) -> int:
        return 0 if self.sizes is None else math.prod(self.sizes)


@dataclass(frozen=True)
class Chunk:
    """Where a part of a tensor lies: `num_bytes` of `file` from byte `start` on, row by row."""

    file: str
    start: int
    num_bytes: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Written:
    """The file that a rank has written, and the parts of tensors in it, by the tensors' names; no file if there are
    none. `states` is what there is on this rank, as a tree, if others lack some of it."""

    file: str
    num_bytes: int
    sha256: str
    chunks: dict[str, Chunk]
    states: Node = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Written":
        """What `dataclasses.asdict` gave, through JSON."""
        return cls(**{**values, "chunks": {name: _chunk(one) for name, one in values["chunks"].items()}})


@dataclass(frozen=True)
class Metadata:
    """The states as a tree (tree.py), the parts of each tensor, and each file's length and digest."""

    states: Node
    chunks: dict[str, list[Chunk]]
    files: dict[str, tuple[int, str]]
    world_size: int
    about: dict[str, object]


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        TypeError: it is sparse, quantized, without data, made of other tensors, or has partial sums only.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(
            f"{name!r} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, but only dense tensors with "
            "data can be written: convert it by to_dense(), dequantize() or to_empty()."
        )
    if is_made_of_others(local_part(tensor)):
        raise TypeError(
            f"{name!r} is a {type(local_part(tensor)).__qualname__}, which is made of other tensors, but a folder "
            "holds plain ones: save it into a file (a path that ends with .pt)."
        )
    if is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(f"{name!r} has partial sums only ({tensor.placements}): redistribute it first.")


def local_box(name: str, tensor: torch.Tensor) -> TensorBox:
    """The part of `tensor` that this rank holds; all of it, if it is not sharded.

    Raises:
        TypeError: as `check_dense`, or it is cut into several pieces a rank.
    """
    check_dense(name, tensor)
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    if not is_dtensor(tensor):
        return TensorBox(shape, dtype, (0,) * len(shape), shape)
    if tensor.device_mesh.get_coordinate() is None:
        return TensorBox(shape, dtype, (0,) * len(shape), None)
    pieces = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # as torch.distributed.checkpoint sees it
    local = tuple(local_part(tensor).shape)
    if len(pieces) != 1 or tuple(pieces[0].sizes) != local:
        raise TypeError(f"{name!r} is laid out as {tensor.placements}, of which one rank holds no one block.")
    return TensorBox(shape, dtype, tuple(pieces[0].offsets), local)


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
                # A second digest of each byte, of the part alone: a reader checks no more than it reads.
                digest = hashlib.sha256(content).hexdigest()
                offsets, sizes = boxes[name].offsets, boxes[name].sizes or ()
                chunks[name] = Chunk(path.name, start, len(content), offsets, sizes, digest)
                start += len(content)
            whole = written.digest()
        os.fsync(file.fileno())
    return Written(path.name, start, whole, chunks)


def write_metadata(
    folder: Path, states: Node, written: Sequence[Written], about: Mapping[str, object] | None = None
) -> None:
    """Write `metadata.json`, what is said `about` the whole in it, and have the folder with all files on the disk.

    Raises:
        OSError: it cannot be written, or a rank's file is not seen from here.
    """
    files = [one for one in written if one.chunks]
    for one in files:
        if not (folder / one.file).is_file() or (folder / one.file).stat().st_size != one.num_bytes:
            raise OSError(f"{folder / one.file} is not seen by rank 0: the folder must be one that all ranks share.")
    chunks: dict[str, list[dict[str, Any]]] = {}
    for one in files:
        for name, chunk in one.chunks.items():
            chunks.setdefault(name, []).append(asdict(chunk))
    body = {
        "about": dict(about or {}),
        "format": FORMAT_VERSION,
        "byteorder": sys.byteorder,
        "torch": torch.__version__,
        "world_size": len(written),
        "files": {one.file: {"num_bytes": one.num_bytes, "sha256": one.sha256} for one in files},
        "states": states,
        "chunks": chunks,
    }
    with open(folder / METADATA, "xb") as file:
        file.write(_rendered(body))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


# -- reading -----------------------------------------------------------------------------------------------------


def read_metadata(folder: Path) -> Metadata:
    """What is in the folder.

    Raises:
        FileNotFoundError: there is no such folder. CorruptCheckpointError: `metadata.json` is missing or was changed.
        ValueError: it is of another format, or of a machine with another byte order.
    """
    path = folder / METADATA
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no sharded checkpoint {folder}.")
    with as_corrupt(path):
        raw = read_whole(path)
        body = json.loads(raw)["body"]
        # Every byte counts: what reads the same but is written otherwise was changed too.
        if _rendered(body) != raw:
            raise ValueError("its digest does not fit")
        if not isinstance(body, dict):
            raise TypeError("it holds no dict")
    if body.get("format") != FORMAT_VERSION or body.get("byteorder") != sys.byteorder:
        raise ValueError(
            f"{path} is of format {body.get('format')!r} in {body.get('byteorder')}-endian order, but this version "
            f"reads format {FORMAT_VERSION} in {sys.byteorder}-endian order."
        )
    with as_corrupt(path):
        files = body["files"].items()
        metadata = Metadata(
            states=body["states"],
            chunks={name: [_chunk(one) for one in parts] for name, parts in body["chunks"].items()},
            files={_file_name(name): (_number(one["num_bytes"]), str(one["sha256"])) for name, one in files},
            world_size=_number(body["world_size"]),
            about=dict(body["about"]),
        )
        check_declared(metadata.states, metadata.chunks, metadata.files)
        return metadata


def read_whole(path: Path) -> bytes:
    """`metadata.json`, not checked.

    Raises:
        CorruptCheckpointError: it is missing. OSError: it cannot be read. ValueError: it begins otherwise, or is huge.
    """
    try:
        return read_regular(path, _START, _MOST_BYTES)
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing, so the rest of the folder cannot be read.") from None


def checked_chunk(folder: Path, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
    """A part of a tensor, on the CPU, after its digest was found right. Shapes: (*chunk.sizes).

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
    """The elements row by row, on the host. No copy for what lies there so already."""
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data


def _rendered(body: Mapping[str, Any]) -> bytes:
    """`body` and its digest, the one way it is written."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f'{{"body":{text},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'.encode()


@contextmanager
def as_corrupt(path: Path) -> Iterator[None]:
    """Data of another form than was written: it was changed."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, RuntimeError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise MadeUpError(f"{path} was changed: {error}") from error


def _chunk(one: Mapping[str, Any]) -> Chunk:
    offsets, sizes = (tuple(map(_number, one[name])) for name in ("offsets", "sizes"))
    start, num_bytes = _number(one["start"]), _number(one["num_bytes"])
    if len(offsets) != len(sizes):
        raise ValueError(f"{one} is no part of a tensor")
    return Chunk(_file_name(one["file"]), start, num_bytes, offsets, sizes, str(one["sha256"]))


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:80]} is no length or place")
    return value


def _file_name(name: str) -> str:
    if not FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is none of its files")
    return name
