"""Checkpoints that all ranks write together into one folder, and read back with any other number of ranks.

    checkpoint_7/
        rank_00000.bin ...   the tensors' bytes, one file a rank; what several ranks hold is written by one of them
        rank_00000.json ...  which bytes are what, everything that is no tensor, and their digests
        metadata.json        the digests of these, and an index: which ranks have written what of a tensor

There is no pickle in it, and no code here could read one. A folder with its final name is complete.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dengine import atomic_files
from dengine.checkpoint.disk.space import wait_for_space
from dengine.checkpoint.formats.sharded.boxes import TensorBox, check_dense, local_box
from dengine.checkpoint.formats.sharded.files import METADATA, write_metadata, write_tensors
from dengine.checkpoint.formats.sharded.index import index_of, kept_name
from dengine.checkpoint.formats.sharded.owners import Owners
from dengine.checkpoint.formats.sharded.parts import Parts, apart, merged
from dengine.checkpoint.formats.sharded.read import read_states
from dengine.checkpoint.formats.sharded.report import Report, Structure, digest_of_reports
from dengine.checkpoint.formats.sharded.saved import Table, table_name, write_root
from dengine.checkpoint.formats.sharded.structure import structure_of
from dengine.checkpoint.formats.sharded.together import on_rank_zero, shared_by_all
from dengine.checkpoint.formats.sharded.tree import encoded
from dengine.checkpoint.formats.sharded.verify import is_shard_folder
from dengine.distributed import rank_zero_only, world

__all__ = ["Known", "ShardPlan", "plan_shards", "read_shards", "write_shards"]

T = TypeVar("T")

# -- writing -----------------------------------------------------------------------------------------------------


class Known:
    """Results of a save about all ranks, which stay valid while each rank has the same structure."""

    owners: Owners | None = None
    boxes: Mapping[str, TensorBox] = {}  # of what this rank writes
    index: Mapping[str, Any] = {}  # on rank 0


def write_shards(
    folder: Path,
    states: Mapping[str, object],
    *,
    about: Mapping[str, object] | None = None,
    commit: Callable[[Path], T] | None = None,
    parts: Parts | None = None,
    own: Mapping[str, object] | None = None,
    known: Known | None = None,
) -> T | None:
    """Write `states` into `folder`: tensors, sharded (DTensor) or not, and plain values, nested as they are.

    Collective: call on all ranks. The names are the union of those that the ranks have. Each rank writes its part of
    what is sharded; what is replicated (DTensor) is spread over them; of what is neither, tensors or not, the first
    rank's that has it counts, as in a file. What is sharded over some ranks and replicated over others is taken from
    one replica as a whole. Everything goes into a temporary folder beside it, is flushed to the disk, and is renamed
    in one step at the end. If that fails on any rank, nothing is left, and all raise.

    Args:
        about: the description of the folder, which comes first.
        commit: gives the temporary folder its name, on rank 0, once everything is on the disk; all ranks get the
            result. By default a plain rename, which refuses to replace an existing folder.
        parts: the names, by their paths, of which other ranks have tensors of their own; names that several parts have
            are kept as `pp=0/weight`, `pp=1/weight`.
        own: what this rank alone has, under names that no other rank has: only this rank reads it again.
        known: the results of the last save, for the next one.

    The folder must be one that all ranks see. Cost: four small collectives, two more if `known` has not the same
    structure; two SHA-256 over the rank's bytes; one tensor at a time is copied to the host.

    Raises:
        TypeError: a value is neither a dense tensor nor plain data; the message has its path.
        CheckpointError: `folder` exists already, ranks differ in a tensor, or a file cannot be written.
    """
    plan = plan_shards(
        Path(folder), states, may_exist=commit is not None, about=about, parts=parts, own=own, known=known
    )
    try:
        tables = shared_by_all(plan.write, f"write {folder}")
        return on_rank_zero(lambda: plan.finish(tables, commit), f"commit {folder}")
    except BaseException:
        _discard(plan.temporary)
        raise
    finally:
        atomic_files.end(plan.temporary)


@dataclass(frozen=True)
class ShardPlan:
    """What this rank is to write of a folder that is being made: `mine` into a file; `boxes` says what part that is."""

    folder: Path
    temporary: Path
    rank: int
    num_ranks: int
    about: Mapping[str, object]
    tree: Any
    mine: dict[str, torch.Tensor]
    boxes: Mapping[str, TensorBox]
    index: Mapping[str, Any]

    @property
    def is_lone(self) -> bool:
        """Whether one rank writes it all: its table is the description of the folder."""
        return self.num_ranks == 1

    def write(self) -> Table:
        """Write this rank's file and its document, down to the disk. No collective."""
        written = write_tensors(self.temporary / f"rank_{self.rank:05d}.bin", self.mine, self.boxes)
        path = self.temporary / (METADATA if self.is_lone else table_name(self.rank))
        about = self.about if self.is_lone else {}
        return Table(*write_metadata(path, self.tree, written, self.num_ranks, about), written.num_bytes)

    def finish(self, tables: Sequence[Table], commit: Callable[[Path], T] | None) -> T | None:
        """On rank 0, once all have written: write the description, and give the folder its name. No collective."""
        if not self.is_lone:
            write_root(self.temporary, tables, self.index, self.about)
        atomic_files.sync(self.temporary)
        if commit is not None:
            return commit(self.temporary)
        _new(self.temporary, self.folder)
        return None


def plan_shards(
    folder: Path,
    states: Mapping[str, object],
    *,
    may_exist: bool,
    about: Mapping[str, object] | None = None,
    parts: Parts | None = None,
    own: Mapping[str, object] | None = None,
    known: Known | None = None,
) -> ShardPlan:
    """Plan which rank writes what, and make an empty temporary folder, until `atomic_files.end`. Tensors are not
    copied.

    Collective: one gather, one broadcast; two more gathers if `known` has not the same structure. Raises: as
    `write_shards`.
    """
    known, parts, here = Known() if known is None else known, parts or {}, world()
    tensors: dict[str, torch.Tensor] = {}
    mine: dict[str, torch.Tensor] = {}
    made: list[tuple[Any, Any, Structure]] = []

    def describe() -> tuple[Report, Path, bytes]:
        tree = encoded(dict(states), tensors)
        own_tree = encoded(dict(own or {}), mine)
        structure, report = structure_of(tensors, parts)
        for name, tensor in (*tensors.items(), *mine.items()):
            check_dense(name, tensor)
        made.append((tree, own_tree, structure))
        return report, atomic_files.temporary_path(folder), b"" if known.owners is None else known.owners.digest

    described = shared_by_all(describe, f"plan {folder}")
    (tree, own_tree, structure), temporary = made[0], described[0][1]
    reports = [report for report, *_ in described]
    # From the reports of all ranks, as one of them may have been interrupted in the save before.
    if {digest for *_, digest in described} != {digest_of_reports(reports)}:
        known.owners = None
        _find_out(known, reports, structure, tensors, folder)
    owners = known.owners
    assert owners is not None  # of the digest that all have
    boxes = {**known.boxes, **{name: local_box(name, tensor) for name, tensor in mine.items()}}
    mine |= {name: tensors[name] for name in known.boxes}
    if owners.colliding:
        tree = encoded(apart(dict(states), parts, owners.colliding), {})
        names = {entry.name: kept_name(entry, owners.colliding) for entry in structure.entries}
        mine = {names.get(name, name): tensor for name, tensor in mine.items()}
        boxes = {names.get(name, name): box for name, box in boxes.items()}
    atomic_files.begin(temporary)
    try:
        on_rank_zero(lambda: _prepare_folder(folder, temporary, may_exist=may_exist), f"make {temporary}")
    except BaseException:
        _discard(temporary)
        atomic_files.end(temporary)
        raise
    tree = merged([tree, own_tree]) if here.rank in owners.tellers else own_tree
    return ShardPlan(folder, temporary, here.rank, here.size, about or {}, tree, mine, boxes, known.index)


def _find_out(
    known: Known, reports: Sequence[Report], mine: Structure, tensors: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Collective: two gathers, of what each different structure is, and of what is cut unevenly."""
    owners = _owners_of(reports, mine, folder)
    here = world()
    boxes: dict[str, TensorBox] = {}

    def uneven() -> list[str]:
        boxes.update({name: local_box(name, tensors[name]) for name in owners.written_by(here.rank)})
        found = {name: (box.offsets, box.sizes) for name, box in boxes.items() if box.num_elements}
        return [name for name, block in owners.blocks_of(here.rank) if name in found and block != found[name]]

    irregular = {name for names in shared_by_all(uneven, f"plan {folder}") for name in names}
    known.boxes = {name: box for name, box in boxes.items() if box.num_elements}
    known.index = index_of(owners, irregular, here.mesh_sizes) if here.rank == 0 else {}
    known.owners = owners


def _owners_of(reports: Sequence[Report], mine: Structure, folder: Path) -> Owners:
    """The owners of all tensors. Collective: one gather, of the different structures."""
    digests = Owners.representatives(reports)
    rank = world().rank
    gives = rank == digests[reports[rank].digest]
    given = shared_by_all(lambda: mine if gives else None, f"plan {folder}")
    return Owners(reports, {digest: given[rank] for digest, rank in digests.items()})  # type: ignore[misc]


def _prepare_folder(folder: Path, temporary: Path, *, may_exist: bool) -> None:
    """Make the temporary folder. Leftovers of killed runs are removed first: the disk may be full of them."""
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
    """The states in `folder`, as new tensors with the layouts of those in `like`, which is not changed.

    Collective: call on all ranks, with `like` of the same structure. Each rank reads the parts that it needs, and
    compares each with its digest before it is used. Dtypes are those that were saved.

    Args:
        like: the saved states to read, by name, and their layouts: `{"model": model.state_dict()}`. A tensor in it
            gives the layout (DTensor or whole) and the device. Tensors without a counterpart in it come whole, on the
            CPU; so does everything under a None. `LikeParameters` stands for an optimizer's state, which need not
            exist yet. Without `like`, all states are read, whole.
        parts: this rank's names, by their paths, if other ranks have others: of these, it reads only its own.

    Raises, on every rank:
        FileNotFoundError: there is no such folder.
        CorruptCheckpointError: a part of it is missing or was changed; the message names the file.
        ValueError: a tensor of `like` was not saved, or with another shape.

    Cost: one small collective; memory for this rank's part, and for one part as it was saved. A saved part is read as
    a whole if any of it is needed.
    """
    folder = Path(folder)
    read: list[dict[str, Any]] = []
    shared_by_all(lambda: read.append(read_states(folder, like, parts or {}, world().rank)), f"read {folder}")
    return read[0]
