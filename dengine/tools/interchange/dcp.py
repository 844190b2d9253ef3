"""Folders of `torch.distributed.checkpoint` (DCP)."""

import dataclasses
import math
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch

from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.tools.interchange.base import OtherFormat, Reader, in_files
from dengine.tools.text import say

__all__ = ["DistributedCheckpoint"]

_METADATA = ".metadata"
_RECORDS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


class DistributedCheckpoint(OtherFormat):
    """What `torch.distributed.checkpoint.load(state_dict, checkpoint_id=folder)` reads into a state dict.

    Its index is a pickle. It is read here by its own records alone: what else a pickle could name is refused. Values
    that are no tensors are pickles by themselves, and are not read.
    """

    name = "dcp"

    def write(self, state: Mapping[Any, Any], read: Reader, target: Path) -> None:
        from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, SavePlanner, save
        from torch.futures import Future

        class Planner(DefaultSavePlanner):
            def lookup_object(self, index: Any) -> Any:
                found = super().lookup_object(index)
                return read(found) if isinstance(found, torch.Tensor) else found

        class Writer(FileSystemWriter):  # which keeps all tensors of a file until it is written
            def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
                written: list[Any] = []
                for number, items in enumerate(in_files(plan.items, _num_bytes)):
                    prefix = dataclasses.replace(plan.storage_data, prefix=f"__0_{number}_")
                    part = dataclasses.replace(plan, items=items, storage_data=prefix)
                    written += super().write_data(part, planner).wait()
                result: Future[list[Any]] = Future()
                result.set_result(written)
                return result

        with _as_errors(target):
            save(dict(state), storage_writer=Writer(target), planner=Planner(), no_dist=True)

    def is_at(self, source: Path) -> bool:
        return (source / _METADATA).is_file()

    def read(self, source: Path) -> dict[Any, Any]:
        from torch.distributed.checkpoint import FileSystemReader, load
        from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

        class PlainReader(FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
                return metadata

        if not self.is_at(source):
            raise CheckpointError(f"{source} has no {_METADATA}, so it is none of torch.distributed.checkpoint.")
        with _as_errors(source):
            metadata: Metadata = _metadata(source / _METADATA)
            saved = metadata.state_dict_metadata
            tensors = {name: each for name, each in saved.items() if isinstance(each, TensorStorageMetadata)}
            flat: dict[str, Any] = {
                name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()
            }
            load(flat, storage_reader=PlainReader(source), no_dist=True)
        others = [name for name in saved if name not in tensors]
        if others:
            say(
                f"{len(others)} values of {source} are left out, such as {others[0]!r}: they are no tensors, and "
                "torch.distributed.checkpoint keeps them as pickles.",
                sys.stderr,
            )
        return _nested(flat, metadata.planner_data)


def _num_bytes(item: Any) -> int:
    """What a part of a plan adds to a file; nothing if it is no tensor."""
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * int(data.properties.dtype.itemsize)


def _nested(flat: Mapping[str, torch.Tensor], paths: Any) -> dict[Any, Any]:
    """The tensors at the paths that they had before they were saved under one name each."""
    state: dict[Any, Any] = {}
    for name, tensor in flat.items():
        path = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
        inside = state
        for part in path[:-1]:
            inside = inside.setdefault(part, {})
        inside[path[-1]] = tensor
    return state


def _metadata(path: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    with open(path, "rb") as file:
        metadata = _Records(file).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__qualname__}")
    for each in (metadata.storage_data or {}).values():
        if PurePath(each.relative_path).is_absolute() or ".." in PurePath(each.relative_path).parts:
            raise ValueError(f"it names the file {each.relative_path!r}")
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    return metadata


class _Records(pickle.Unpickler):
    """Looks up DCP's own records, and what they are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and ((module, name) in _NAMES or module in ("torch", "pathlib", *_RECORDS)):
            found = super().find_class(module, name)
            if (module, name) in _NAMES or isinstance(found, torch.dtype) or _is_record(found, module):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no record of torch.distributed.checkpoint")


def _is_record(found: object, module: str) -> bool:
    if not isinstance(found, type):
        return False
    is_own = found.__module__ == module and (dataclasses.is_dataclass(found) or issubclass(found, Enum))
    return is_own or issubclass(found, PurePath)


@contextmanager
def _as_errors(path: Path) -> Iterator[None]:
    """DCP's own exceptions, which are no `Exception`s, as ours; without its warning that there are no ranks."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except (CheckpointError, OSError):
        raise
    except CheckpointException as error:
        cause = next((each for each, _ in error.failures.values()), error)
        if isinstance(cause, CheckpointError | OSError) or not isinstance(cause, Exception):  # an interrupt
            raise cause from None
        raise CorruptCheckpointError(f"{path} is damaged: {type(cause).__qualname__}: {cause}") from error
    except Exception as error:
        raise CorruptCheckpointError(f"{path} is damaged: {type(error).__qualname__}: {error}") from error
