"""Checkpoints that all ranks write together into one folder, and read back with any other number of ranks.

    checkpoint_7/
        rank_00000.bin ...  the tensors' bytes, one file a rank; what several ranks hold is written by one of them
        metadata.json       which bytes are what, everything that is no tensor, and the digests of all of it

There is no pickle in it, and reading one would need a reader that is not here. A folder under its final name is whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from dengine import atomic_files
from dengine.checkpoint.disk.room import wait_for_room
from dengine.checkpoint.formats.sharded.files import (
    MadeUpError,
    TensorBox,
    Written,
    local_box,
    write_metadata,
    write_tensors,
)
from dengine.checkpoint.formats.sharded.read import read_states
from dengine.checkpoint.formats.sharded.tree import encoded
from dengine.checkpoint.formats.sharded.verify import is_shard_folder
from dengine.comm.outcome import Failure, from_rank_zero, on_all_ranks
from dengine.distributed import rank_zero_only, world
from dengine.dtensor import is_dtensor
from dengine.errors import CheckpointError, CorruptCheckpointError

__all__ = ["ShardPlan", "plan_shards", "read_shards", "shared_by_all", "write_shards"]

T = TypeVar("T")

# What keeps its class on the way to the other ranks; everything else arrives as a CheckpointError.
_KEPT_CLASSES: tuple[type[Exception], ...] = (
    MadeUpError,
    CorruptCheckpointError,
    FileNotFoundError,
    TypeError,
    ValueError,
)


# -- writing -----------------------------------------------------------------------------------------------------


def write_shards(
    folder: Path,
    states: Mapping[str, object],
    *,
    about: Mapping[str, object] | None = None,
    commit: Callable[[Path], T] | None = None,
) -> T | None:
    """Write `states` into `folder`: tensors, sharded (DTensor) or not, and plain values, nested as they are.

    Collective: call on all ranks, with the same structure. Each rank writes its part of what is sharded; what is
    replicated (DTensor) is spread over them; of what is neither, tensors or not, rank 0's counts, as in a file. All
    goes into a temporary folder beside, is flushed to the disk, and gets its name in one step at the end. Where that
    fails, on any rank, nothing is left, and all raise.

    Args:
        about: what the folder says of itself, first of all.
        commit: gives the temporary folder its name, on rank 0, once all of it is on the disk; all ranks get the result.
            By default a plain rename, which refuses to take the place of a folder that is there.

    The folder must be one that all ranks see. Cost: four small collectives; two SHA-256 over the rank's bytes; one
    tensor at a time is copied to the host.

    Raises:
        TypeError: something that is neither a dense tensor nor plain data, with its path.
        CheckpointError: `folder` is there already, ranks differ in their tensors, or a file cannot be written.
    """
    plan = plan_shards(Path(folder), states, may_exist=commit is not None)
    try:
        written = shared_by_all(plan.write, f"write {folder}")
        return _on_rank_zero(lambda: plan.finish(written, about, commit), f"commit {folder}")
    except BaseException:
        _discard(plan.temporary)
        raise
    finally:
        atomic_files.end(plan.temporary)


@dataclass(frozen=True)
class ShardPlan:
    """What this rank is to write of a folder that is being made: `mine` into `file`; `boxes` says what part that is."""

    folder: Path
    temporary: Path
    file: Path
    tree: Any
    mine: dict[str, torch.Tensor]
    boxes: dict[str, TensorBox]

    def write(self) -> Written | None:
        """This rank's file, down to the disk. No collective."""
        return write_tensors(self.file, self.mine, self.boxes)

    def finish(
        self,
        written: Sequence[Written | None],
        about: Mapping[str, object] | None,
        commit: Callable[[Path], T] | None,
    ) -> T | None:
        """On rank 0, once all have written: say what there is, and give the folder its name. No collective."""
        write_metadata(self.temporary, self.tree, written, about)
        if commit is not None:
            return commit(self.temporary)
        _new(self.temporary, self.folder)
        return None


def plan_shards(folder: Path, states: Mapping[str, object], *, may_exist: bool) -> ShardPlan:
    """Who writes what, and an empty temporary folder for it, until `atomic_files.end`. The tensors are the live ones.

    Collective: one gather, one broadcast. Raises: as `write_shards`.
    """
    tensors: dict[str, torch.Tensor] = {}
    trees: list[Any] = []

    def plan() -> tuple[dict[str, TensorBox], Path]:
        trees.append(encoded(dict(states), tensors))
        return {name: _held_box(name, tensor) for name, tensor in tensors.items()}, atomic_files.temporary_path(folder)

    plans = shared_by_all(plan, f"plan {folder}")
    boxes, temporary = [boxes for boxes, _ in plans], plans[0][1]
    mine = {name: tensors[name] for name in _writers(boxes)[world().rank]}
    atomic_files.begin(temporary)
    try:
        _on_rank_zero(lambda: _make_room(folder, temporary, may_exist=may_exist), f"make {temporary}")
    except BaseException:
        _discard(temporary)
        atomic_files.end(temporary)
        raise
    file = temporary / f"rank_{world().rank:05d}.bin"
    return ShardPlan(folder, temporary, file, trees[0], mine, boxes[world().rank])


def _held_box(name: str, tensor: torch.Tensor) -> TensorBox:
    """What of `tensor` this rank has to offer. Of a plain one only rank 0: they may differ (buffers of a batch norm),
    and a mean from one rank would not go with a variance from another."""
    box = local_box(name, tensor)
    return box if world().rank == 0 or is_dtensor(tensor) else replace(box, sizes=None)


def _writers(boxes: Sequence[Mapping[str, TensorBox]]) -> list[list[str]]:
    """Who writes what: for each rank, the tensors whose part it writes. A part that several hold goes to the one
    with the least so far; the same on every rank, since all compute it from the same.

    Raises:
        CheckpointError: the parts of the ranks do not make up the tensors.
    """
    _check_alike(boxes)
    loads = [0] * len(boxes)
    writers: list[list[str]] = [[] for _ in boxes]
    for name, first in boxes[0].items():
        holders: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for rank, box in enumerate(boxes):
            if box[name].num_elements:
                holders.setdefault((box[name].offsets, box[name].sizes or ()), []).append(rank)
        if sum(math.prod(sizes) for _, sizes in holders) != math.prod(first.shape):
            raise CheckpointError(
                f"The ranks' parts of {name!r} do not make up its shape {first.shape}: {sorted(holders)}."
            )
        for (_, sizes), ranks in holders.items():
            rank = min(ranks, key=lambda rank: loads[rank])
            loads[rank] += math.prod(sizes)
            writers[rank].append(name)
    return writers


def _check_alike(boxes: Sequence[Mapping[str, TensorBox]]) -> None:
    wanted = {name: (box.shape, box.dtype) for name, box in boxes[0].items()}
    for rank, other in enumerate(boxes):
        found = {name: (box.shape, box.dtype) for name, box in other.items()}
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"All ranks must save the same tensors, but {name!r} is {wanted.get(name, 'not there')} on rank 0 "
                    f"and {found.get(name, 'not there')} on rank {rank}."
                )


def _make_room(folder: Path, temporary: Path, *, may_exist: bool) -> None:
    """Make the temporary folder. What killed runs have left goes first: it may be what fills the disk."""
    if folder.exists() and not (may_exist and is_shard_folder(folder, alone=True)):
        raise _taken(folder)
    atomic_files.make_folder(folder.parent)
    wait_for_room()
    atomic_files.remove_leftovers(folder.parent)
    atomic_files.recover(folder.parent)
    temporary.mkdir()


def _new(temporary: Path, folder: Path) -> None:
    if folder.exists():  # made meanwhile
        raise _taken(folder)
    atomic_files.commit(temporary, folder)


def _taken(folder: Path) -> FileExistsError:
    return FileExistsError(f"{folder} is there already; what is complete is never overwritten: choose another name.")


@rank_zero_only
def _discard(temporary: Path) -> None:
    atomic_files.discard(temporary)


# -- reading -----------------------------------------------------------------------------------------------------


def read_shards(folder: Path, like: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The states in `folder`, as new tensors laid out as those in `like`. Nothing of `like` is changed.

    Collective: call on all ranks, with `like` of the same structure. Each rank reads the parts that it needs, and
    compares each with its digest before it is used. Dtypes are those that were saved.

    Args:
        like: which of the saved states to read, by name, and how: `{"model": model.state_dict()}`. A tensor in it
            stands for its layout (DTensor or whole) and device. What has no counterpart in it comes whole, on the
            CPU; so does everything under a None. `LikeParameters` lays out an optimizer's state, which need not be
            there yet. Without `like`, all states are read, whole.

    Raises, on every rank:
        FileNotFoundError: there is no such folder.
        CorruptCheckpointError: something in it is missing or was changed; it names the file.
        ValueError: a tensor of `like` was not saved, or with another shape.

    Cost: one small collective; memory for this rank's part, and for one part as it was saved. A saved part is read as
    a whole if any of it is needed.
    """
    folder = Path(folder)
    read: list[dict[str, Any]] = []
    shared_by_all(lambda: read.append(read_states(folder, like)), f"read {folder}")
    return read[0]


def shared_by_all(action: Callable[[], T], purpose: str) -> list[T]:
    """Every rank's result of `action`. Collective: one gather of objects.

    Raises:
        CheckpointError, or what `_KEPT_CLASSES` has of the failure: on all ranks, if it fails on one.
    """
    return on_all_ranks(action, purpose, lambda error: _failure(error, purpose))


def _failure(error: Exception, purpose: str) -> Failure:
    """As every rank can raise it."""
    start = f"Rank {world().rank} could not {purpose}: "
    for kind in _KEPT_CLASSES:
        if isinstance(error, kind):
            return kind, f"{start}{error}"
    return CheckpointError, f"{start}{type(error).__qualname__}: {error}"


def _on_rank_zero(action: Callable[[], T], purpose: str) -> T:
    return from_rank_zero(
        action,
        purpose,
        lambda error: (CheckpointError, f"Rank 0 could not {purpose}: {type(error).__qualname__}: {error}"),
    )
