"""Read the states of one checkpoint in one process, tensor by tensor, for tools that have no objects to load into."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.catalogue.manifest import entry_of, refuse_other
from dengine.checkpoint.disk.archive import check_archive
from dengine.checkpoint.disk.regular import open_regular
from dengine.checkpoint.formats.sharded.files import Chunk
from dengine.checkpoint.formats.sharded.read import read_whole_tensor
from dengine.checkpoint.formats.sharded.saved import read_metadata
from dengine.checkpoint.formats.sharded.tree import decoded, path_text
from dengine.checkpoint.formats.sharded.verify import check_length, holds_shards
from dengine.checkpoint.loading import verify
from dengine.checkpoint.states.plain import check_loaded
from dengine.checkpoint.states.snapshot import States
from dengine.errors import CheckpointError, CorruptCheckpointError

__all__ = ["SavedStates", "mapped_states", "saved_states"]


@dataclass(frozen=True)
class SavedStates:
    """The states in a checkpoint, by name.

    Attributes:
        states: a tensor in them has its shape and dtype; of a folder, it has no data (it is on the meta device).
    """

    path: Path
    entry: Entry
    states: States
    _saved: dict[int, tuple[torch.Tensor, list[Chunk]]]  # by the id of a placeholder: that, and the parts of its data

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The data of a tensor in `states`, on the CPU. Cost: of a folder, its bytes are read, and their SHA-256.

        Raises:
            CorruptCheckpointError: they were changed.
        """
        found = self._saved.get(id(tensor))
        return tensor if found is None else read_whole_tensor(self.path, found[1], tensor.dtype, tensor.shape)


def saved_states(path: Path) -> SavedStates:
    """The states in the checkpoint `path`, a file or a folder. On this rank only; no collective.

    Cost: a file is read once, for its digest, and mapped into memory; of a folder, the documents of all ranks are read.

    Raises:
        CorruptCheckpointError: it was changed, or has content that no checkpoint has. CheckpointError: it does not
            exist, is no checkpoint, or cannot be read.
    """
    try:
        return _folder(path) if holds_shards(path) else _file(path)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def mapped_states(path: Path) -> States:
    """The states in a file that `verify` has found intact. Tensors are mapped, so that unused ones are not read.

    Raises:
        Exception: it cannot be loaded without executing a pickle, or does not hold states.
    """
    with open_regular(path) as file:
        check_archive(file)
    states: States = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    check_loaded(states)
    return states


def _file(path: Path) -> SavedStates:
    entry = verify(path)
    try:
        return SavedStates(path, entry, mapped_states(path), {})
    except OSError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__qualname__])[0]
        raise CorruptCheckpointError(f"{path} is as it was saved, but holds no states: {reason}") from error


def _folder(path: Path) -> SavedStates:
    entry = entry_of(path)
    refuse_other(entry, path)
    metadata = read_metadata(path)
    for name, (num_bytes, _) in metadata.files.items():  # before memory is taken for their content
        check_length(path / name, num_bytes)
    saved: dict[int, tuple[torch.Tensor, list[Chunk]]] = {}

    def placeholder(place: tuple[Any, ...], dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        saved[id(tensor)] = tensor, metadata.chunks.get(path_text(place), [])
        return tensor

    return SavedStates(path, entry, _plain(decoded(metadata.states, placeholder)), saved)


def _plain(value: Any) -> Any:
    """`value` with plain lists instead of our own subclasses of list."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return tuple(map(_plain, value)) if type(value) is tuple else value
