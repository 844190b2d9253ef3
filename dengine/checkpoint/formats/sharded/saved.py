"""What a folder holds, as a reader asks for it: the states, and where the pieces of a tensor lie.

metadata.json       of a lone rank: everything. Of several: the digests of their documents, and an index (index.py)
rank_00003.json     what this rank has written, in the form of a lone rank's metadata.json
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch

from dengine.checkpoint.disk.regular import open_regular
from dengine.checkpoint.formats.sharded.boxes import TensorBox
from dengine.checkpoint.formats.sharded.check import check_declared, check_parts, check_states
from dengine.checkpoint.formats.sharded.files import (
    METADATA,
    Chunk,
    Metadata,
    as_corrupt,
    number,
    parsed,
    read_body,
    write_body,
)
from dengine.checkpoint.formats.sharded.index import Index
from dengine.checkpoint.formats.sharded.parts import Parts, keeps_apart, merged
from dengine.checkpoint.formats.sharded.tree import Node
from dengine.distributed import world
from dengine.errors import CorruptCheckpointError

__all__ = ["Saved", "Table", "open_saved", "read_metadata", "table_name", "write_root"]

ROOT_VERSION = 2


class Table(NamedTuple):
    """What rank 0 learns of a rank's document: its length and digest, and the length of the file of tensors."""

    num_bytes: int
    sha256: str
    data_bytes: int


def table_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def write_root(
    folder: FilePath, tables: Sequence[Table], index: Mapping[str, Any], about: Mapping[str, object]
) -> None:
    """Write the `metadata.json` of several ranks.

    Raises:
        OSError: it cannot be written, or a rank's document is not seen from here.
    """
    seen = {each.name for each in folder.iterdir()}
    missing = next((rank for rank in range(len(tables)) if table_name(rank) not in seen), None)
    if missing is not None:
        raise OSError(
            f"{folder / table_name(missing)} is not seen by rank 0: the folder must be one that all ranks share."
        )
    body = {
        "format": ROOT_VERSION,
        "world_size": len(tables),
        "tables": [[each.num_bytes, each.sha256] for each in tables],
        "index": index,
    }
    others = sum(each.num_bytes + each.data_bytes for each in tables)
    write_body(folder / METADATA, {**body, "about": {**about, "num_other_bytes": others}})


class Saved(ABC):
    """A folder, of which no more is read than is asked for."""

    @abstractmethod
    def states(self, parts: Parts, rank: int) -> Node:
        """The tree of all that a rank may want which has `parts`."""

    @abstractmethod
    def pieces(self, name: str, dtype: torch.dtype, box: TensorBox) -> Sequence[Chunk]:
        """Where everything lies that is within the box of a tensor, checked against what the files declare."""

    @abstractmethod
    def length_of(self, file: str) -> int:
        """The length of a file in which a piece lies."""

    @property
    def mesh_sizes(self) -> Mapping[str, int] | None:
        """The sizes of the mesh that has saved, if names of several parts collide; None if they are not known."""
        return None

    @abstractmethod
    def whole(self) -> Metadata:
        """All of it, as one document."""


def open_saved(folder: FilePath) -> Saved:
    """
    Raises:
        FileNotFoundError: there is no such folder. CorruptCheckpointError: `metadata.json` is missing or was changed.
        ValueError: it is of another format, or of a machine with another byte order.
    """
    path = folder / METADATA
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no sharded checkpoint {folder}.")
    body = read_body(path)
    if body.get("format") == ROOT_VERSION and "tables" in body:
        with as_corrupt(path):
            return _OfSeveral(folder, body)
    return _OfOne(path, parsed(body, path))


def read_metadata(folder: FilePath) -> Metadata:
    """All that is in the folder, as one document. Cost: the documents of all ranks.

    Raises:
        FileNotFoundError, CorruptCheckpointError, ValueError: as `open_saved`.
    """
    return open_saved(folder).whole()


class _OfOne(Saved):
    """What one rank has written, or several with a dengine that gathered all in `metadata.json`."""

    def __init__(self, path: FilePath, metadata: Metadata) -> None:
        self._metadata = metadata
        with as_corrupt(path):
            check_declared(metadata.states, metadata.chunks, metadata.files)

    def states(self, parts: Parts, rank: int) -> Node:
        return self._metadata.states

    def pieces(self, name: str, dtype: torch.dtype, box: TensorBox) -> Sequence[Chunk]:
        return self._metadata.chunks.get(name, ())

    def length_of(self, file: str) -> int:
        return self._metadata.files[file][0]

    def whole(self) -> Metadata:
        return self._metadata


class _OfSeveral(Saved):
    def __init__(self, folder: FilePath, body: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, dict(body["about"])
        self._tables = [(number(num_bytes), str(sha256)) for num_bytes, sha256 in body["tables"]]
        self._world_size = number(body["world_size"])
        if self._world_size != len(self._tables):
            raise ValueError("it has not one document for each rank")
        self._index = Index(body["index"], self._world_size)
        self._read: dict[int, Metadata] = {}

    def states(self, parts: Parts, rank: int) -> Node:
        tellers = list(self._index.by_teller)
        if parts:
            tellers = self._index.tellers_of(name for path, part in parts.items() for name in _names_of(path, part))
        own = rank if rank < self._world_size else 0
        read = self._documents(sorted({0, own, *tellers}))
        if parts and self.mesh_sizes != world().mesh_sizes and any(keeps_apart(each.states) for each in read):
            # Of another number of parts, none is this rank's: of what they have, it takes only what is equal in all.
            read = self._documents(sorted({0, own, *self._index.by_teller}))
        states = merged(each.states for each in read)
        with as_corrupt(self._folder / METADATA):
            check_states(states)
        return states

    @property
    def mesh_sizes(self) -> Mapping[str, int] | None:
        return self._index.mesh_sizes

    def pieces(self, name: str, dtype: torch.dtype, box: TensorBox) -> Sequence[Chunk]:
        if not box.num_elements or box.sizes is None:
            return ()
        with as_corrupt(self._folder / METADATA):
            ranks = self._index.ranks_of(name, box.shape, (box.offsets, box.sizes))
        if ranks is None:  # a rank's own
            ranks = [rank for rank, each in self._read.items() if name in each.chunks]
        read = self._documents(ranks)
        found = [chunk for each in read for chunk in each.chunks.get(name, ())]
        files = {file: length for each in read for file, length in each.files.items()}
        with as_corrupt(self._folder / METADATA):
            check_parts(name, dtype, torch.Size(box.shape), found, files, (box.offsets, box.sizes))
        return found

    def length_of(self, file: str) -> int:
        return next(each.files[file][0] for each in self._read.values() if file in each.files)

    def whole(self) -> Metadata:
        read = self._documents(range(self._world_size))
        states = merged(each.states for each in read)
        chunks: dict[str, list[Chunk]] = {}
        for each in read:
            for name, parts in each.chunks.items():
                chunks.setdefault(name, []).extend(parts)
        files = {file: length for each in read for file, length in each.files.items()}
        with as_corrupt(self._folder / METADATA):
            check_declared(states, chunks, files)
        return Metadata(states, chunks, files, self._world_size, self._about)

    def _documents(self, ranks: Iterable[int]) -> list[Metadata]:
        """
        Raises:
            CorruptCheckpointError: one is missing, was changed, or is of another save.
        """
        found = []
        for rank in ranks:
            if rank not in self._read:
                self._read[rank] = self._document(rank)
            found.append(self._read[rank])
        return found

    def _document(self, rank: int) -> Metadata:
        path, (num_bytes, sha256) = self._folder / table_name(rank), self._tables[rank]
        try:
            with open_regular(path) as file:
                raw = file.read() if os.fstat(file.fileno()).st_size == num_bytes else b""
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{path} is missing: it says what rank {rank} has written.") from None
        except OSError as error:
            raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise CorruptCheckpointError(
                f"{path} was changed, or is of another save: its SHA-256 is not the one in {METADATA}."
            )
        with as_corrupt(path):
            metadata = parsed(json.loads(raw)["body"], path)
            check_states(metadata.states)
            return metadata


def _names_of(path: Sequence[str], part: str) -> list[str]:
    """The names that what is at `path` may have in a folder."""
    return ["/".join(path), "/".join((*path[:-1], part, path[-1]))]
