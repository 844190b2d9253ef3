"""Checkpoints that all ranks write together into one folder, and read back with any other number of ranks.

    checkpoint_7/
        rank_00000.bin ...  the tensors' bytes, one file a rank; what several ranks hold is written by one of them
        metadata.json       which bytes are what, everything that is no tensor, and the digests of all of it

There is no pickle in it, and reading one would need a reader that is not here. A folder under its final name is whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from dengine import atomic_files
from dengine.checkpoint.disk.space import wait_for_space
from dengine.checkpoint.formats.sharded.files import (
    MadeUpError,
    TensorBox,
    Written,
    check_dense,
    local_box,
    write_metadata,
    write_tensors,
)
from dengine.checkpoint.formats.sharded.owners import Owners, Report, Structure, digest_of_reports
from dengine.checkpoint.formats.sharded.parts import Parts, apart, merged
from dengine.checkpoint.formats.sharded.read import read_states
from dengine.checkpoint.formats.sharded.structure import structure_of
from dengine.checkpoint.formats.sharded.tree import encoded
from dengine.checkpoint.formats.sharded.verify import is_shard_folder
from dengine.comm.outcome import Failure, from_rank_zero, on_all_ranks
from dengine.distributed import rank_zero_only, world
from dengine.errors import CheckpointError, CorruptCheckpointError

__all__ = ["Known", "ShardPlan", "plan_shards", "read_shards", "shared_by_all", "write_shards"]

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


class Known:
    """What ranks have found out about each other at a save, which holds while each of them has the same structure."""

    owners: Owners | None = None
    written: Sequence[str] = ()  # by this rank
    boxes: Mapping[str, TensorBox] = {}


def write_shards(
    folder: Path,
    states: Mapping[str, object],
    *,
    about: Mapping[str, object] | None = None,
    commit: Callable[[Path], T] | None = None,
    parts: Parts | None = None,
    known: Known | None = None,
) -> T | None:
    """Write `states` into `folder`: tensors, sharded (DTensor) or not, and plain values, nested as they are.

    Collective: call on all ranks. The names are the union of those that the ranks have. Each rank writes its part of
    what is sharded; what is replicated (DTensor) is spread over them; of what is neither, tensors or not, the first
    rank's that has it counts, as in a file. What is sharded over some ranks and replicated over others is taken from
    one replica as a whole. All goes into a temporary folder beside, is flushed to the disk, and gets its name in one
    step at the end. Where that fails, on any rank, nothing is left, and all raise.

    Args:
        about: what the folder says of itself, first of all.
        commit: gives the temporary folder its name, on rank 0, once all of it is on the disk; all ranks get the result.
            By default a plain rename, which refuses to take the place of a folder that is there.
        parts: the names, by their paths, of which other ranks have tensors of their own; names that several parts have
            are kept as `pp=0/weight`, `pp=1/weight`.
        known: what the last save has found out, for the next one.

    The folder must be one that all ranks see. Cost: four small collectives, two more if `known` has not the same
    structure; two SHA-256 over the rank's bytes; one tensor at a time is copied to the host.

    Raises:
        TypeError: something that is neither a dense tensor nor plain data, with its path.
        CheckpointError: `folder` is there already, ranks differ in a tensor, or a file cannot be written.
    """
    plan = plan_shards(Path(folder), states, may_exist=commit is not None, parts=parts, known=known)
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
    """What this rank is to write of a folder that is being made: `mine` into `file`; `boxes` says what part that is.
    `tree` is None if another rank has all that is in it."""

    folder: Path
    temporary: Path
    file: Path
    tree: Any
    mine: dict[str, torch.Tensor]
    boxes: Mapping[str, TensorBox]

    def write(self) -> Written:
        """This rank's file, down to the disk. No collective."""
        return replace(write_tensors(self.file, self.mine, self.boxes), states=self.tree)

    def finish(
        self, written: Sequence[Written], about: Mapping[str, object] | None, commit: Callable[[Path], T] | None
    ) -> T | None:
        """On rank 0, once all have written: say what there is, and give the folder its name. No collective."""
        tree = merged(each.states for each in written if each.states is not None)
        write_metadata(self.temporary, tree, written, about)
        if commit is not None:
            return commit(self.temporary)
        _new(self.temporary, self.folder)
        return None


def plan_shards(
    folder: Path,
    states: Mapping[str, object],
    *,
    may_exist: bool,
    parts: Parts | None = None,
    known: Known | None = None,
) -> ShardPlan:
    """Who writes what, and an empty temporary folder for it, until `atomic_files.end`. The tensors are the live ones.

    Collective: one gather, one broadcast; two more gathers if `known` has not the same structure. Raises: as
    `write_shards`.
    """
    known, parts = Known() if known is None else known, parts or {}
    tensors: dict[str, torch.Tensor] = {}
    made: list[tuple[Any, Structure]] = []

    def describe() -> tuple[Report, Path, bytes]:
        tree = encoded(dict(states), tensors)
        structure, report = structure_of(tensors, parts)
        for name, tensor in tensors.items():
            check_dense(name, tensor)
        made.append((tree, structure))
        return report, atomic_files.temporary_path(folder), b"" if known.owners is None else known.owners.digest

    described = shared_by_all(describe, f"plan {folder}")
    (tree, structure), temporary = made[0], described[0][1]
    reports = [report for report, *_ in described]
    owners = known.owners
    # By what all ranks say, as one of them may have been interrupted in the save before.
    if owners is None or {digest for *_, digest in described} != {digest_of_reports(reports)}:
        owners = known.owners = None
        owners = _owners_of(reports, structure, folder)
        known.written = owners.written_by(world().rank)
        known.boxes = _boxes_of(tensors, known.written, folder)
        known.owners = owners
    mine, boxes = {name: tensors[name] for name in known.written}, known.boxes
    if owners.colliding:
        tree, mine, boxes = _kept_apart(states, parts, owners, tensors, mine, boxes)
    atomic_files.begin(temporary)
    try:
        _on_rank_zero(lambda: _prepare_folder(folder, temporary, may_exist=may_exist), f"make {temporary}")
    except BaseException:
        _discard(temporary)
        atomic_files.end(temporary)
        raise
    rank = world().rank
    file = temporary / f"rank_{rank:05d}.bin"
    return ShardPlan(folder, temporary, file, tree if rank in owners.tellers else None, mine, boxes)


def _owners_of(reports: Sequence[Report], mine: Structure, folder: Path) -> Owners:
    """Collective: one gather, of what each different structure is."""
    digests = Owners.representatives(reports)
    rank = world().rank
    gives = rank == digests[reports[rank].digest]
    given = shared_by_all(lambda: mine if gives else None, f"plan {folder}")
    return Owners(reports, {digest: given[rank] for digest, rank in digests.items()})  # type: ignore[misc]


def _boxes_of(tensors: Mapping[str, torch.Tensor], names: Sequence[str], folder: Path) -> dict[str, TensorBox]:
    """Collective: one small gather, so that all raise if one does."""
    boxes: dict[str, TensorBox] = {}
    shared_by_all(lambda: boxes.update({name: local_box(name, tensors[name]) for name in names}), f"plan {folder}")
    return boxes


def _kept_apart(
    states: Mapping[str, object],
    parts: Parts,
    owners: Owners,
    tensors: Mapping[str, torch.Tensor],
    mine: Mapping[str, torch.Tensor],
    boxes: Mapping[str, TensorBox],
) -> tuple[Any, dict[str, torch.Tensor], dict[str, TensorBox]]:
    """The tree, what is written and its boxes, with names of their own for what several parts have."""
    again: dict[str, torch.Tensor] = {}
    tree = encoded(apart(dict(states), parts, owners.colliding), again)
    new = dict(zip(tensors, again, strict=True))  # in the same order
    return tree, {new[name]: each for name, each in mine.items()}, {new[name]: box for name, box in boxes.items()}


def _prepare_folder(folder: Path, temporary: Path, *, may_exist: bool) -> None:
    """Make the temporary folder. What killed runs have left goes first: it may be what fills the disk."""
    if folder.exists() and not (may_exist and is_shard_folder(folder, alone=True)):
        raise _taken(folder)
    atomic_files.make_folder(folder.parent)
    wait_for_space()
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


def read_shards(
    folder: Path, like: Mapping[str, object] | None = None, *, parts: Parts | None = None
) -> dict[str, Any]:
    """The states in `folder`, as new tensors laid out as those in `like`. Nothing of `like` is changed.

    Collective: call on all ranks, with `like` of the same structure. Each rank reads the parts that it needs, and
    compares each with its digest before it is used. Dtypes are those that were saved.

    Args:
        like: which of the saved states to read, by name, and how: `{"model": model.state_dict()}`. A tensor in it
            stands for its layout (DTensor or whole) and device. What has no counterpart in it comes whole, on the
            CPU; so does everything under a None. `LikeParameters` lays out an optimizer's state, which need not be
            there yet. Without `like`, all states are read, whole.
        parts: this rank's names, by their paths, wherever other ranks have others: of these it takes its own alone.

    Raises, on every rank:
        FileNotFoundError: there is no such folder.
        CorruptCheckpointError: something in it is missing or was changed; it names the file.
        ValueError: a tensor of `like` was not saved, or with another shape.

    Cost: one small collective; memory for this rank's part, and for one part as it was saved. A saved part is read as
    a whole if any of it is needed.
    """
    folder = Path(folder)
    read: list[dict[str, Any]] = []
    shared_by_all(lambda: read.append(read_states(folder, like, parts or {})), f"read {folder}")
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
