"""The format of one file, which rank 0 writes."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dengine import atomic_files
from dengine.checkpoint.catalogue.entry import Entry, about
from dengine.checkpoint.disk.footer import write_footer
from dengine.checkpoint.disk.hashing import HashingWriter
from dengine.checkpoint.formats.base import Background, Format, SaveOutcome, SavePlan, agree, publish
from dengine.checkpoint.formats.nodes import Copy, Nodes
from dengine.checkpoint.states.plain import check_loadable
from dengine.checkpoint.states.snapshot import RANDOM, RESERVED, Collected, States, gather_full
from dengine.distributed import all_gather_object
from dengine.dtensor import with_memory
from dengine.errors import CheckpointError
from dengine.types import Stateful

__all__ = ["FileFormat"]

# A process writes one file at a time: torch's switch for checksums is shared by all threads.
_writing = threading.Lock()


class FileFormat(Format):
    """A file with `{name: state_dict}`, for `torch.load(path, weights_only=True)`; sharded tensors are gathered.

    Cost: one small broadcast, and the gathers of sharded tensors.
    """

    ending = ".pt"

    def save(
        self,
        path: Path,
        collected: Collected,
        objects: Mapping[str, Stateful],
        plan: Callable[[], SavePlan],
        background: Background | None = None,
        nodes: Nodes | None = None,
    ) -> SaveOutcome | None:
        if collected.has_own:
            raise CheckpointError(
                f"{path} was not saved: ranks have different parts of a model (parts= of prepare_model), or states of "
                "their own (PerRank), of which a file would keep those of rank 0. Save into a folder, which all ranks "
                "write: a path without an ending."
            )
        of_ranks = collected.of_ranks
        if of_ranks is None:  # on all ranks, as some have a part of a sharded tensor
            of_ranks = all_gather_object(collected.random)
        states = gather_full(collected.states) if collected.is_sharded else dict(collected.states)
        random = {name: [theirs[name] for theirs in of_ranks] for name in collected.random}
        states[RESERVED] = {**states[RESERVED], RANDOM: random}
        if nodes is not None:
            return _save_on_nodes(nodes, path, states, objects, plan, background)

        def on_rank_zero() -> SaveOutcome | None:
            made = plan()
            if background is None:
                return _save(states, made)
            background.start(made, lambda: partial(_save, background.copies.take(states), made))
            return None

        return agree(on_rank_zero, path)


def _save_on_nodes(
    nodes: Nodes,
    path: Path,
    states: States,
    objects: Mapping[str, Stateful],
    plan: Callable[[], SavePlan],
    background: Background | None,
) -> SaveOutcome | None:
    """Collective: one gather; without a background also one broadcast."""
    is_leaving = threading.Event() if background is None else background.is_leaving
    copy = nodes.plan(path, plan, lambda: _num_bytes(check_loadable(states)), objects, is_leaving)
    if background is not None:
        if copy is not None:
            background.start(copy.plan, lambda: _copied(copy, states, background))
        return None
    failure, outcome = None, None
    try:
        outcome = None if copy is None else copy.write(states, _save)
    except Exception as error:  # on rank 0, for all that failed
        failure = error
    return agree(lambda: _raised(failure, outcome), path)


def _copied(copy: Copy, states: States, background: Background) -> Callable[[], SaveOutcome | None]:
    try:
        return partial(copy.write, background.copies.take(states), _save)
    except BaseException as error:
        copy.give_up(error)
        raise


def _raised(failure: Exception | None, outcome: SaveOutcome | None) -> SaveOutcome | None:
    if failure is not None:
        raise failure
    return outcome


def _save(states: States, plan: SavePlan) -> SaveOutcome:
    return publish(*_write(states, plan))


def _write(states: States, plan: SavePlan) -> tuple[Path, SavePlan, Entry]:
    """Write a temporary file beside its path, and flush it. Gives it, the plan, and the entry with its digest.

    States that could not be loaded again are refused before a byte is written. Leftovers of killed runs are removed
    first: the disk may be full of them.

    Raises:
        Exception: an object cannot be pickled, or the disk is full; no temporary file is left.
    """
    tensors = check_loadable(states)
    if plan.path.parent.is_dir():
        atomic_files.remove_leftovers(plan.path.parent)

    def fill(descriptor: int) -> Entry:
        with HashingWriter(descriptor, _num_bytes(tensors)) as file:
            try:
                with _without_checksums():
                    torch.save(states, file)  # type: ignore[arg-type]
                footer = write_footer(file, about(plan.entry))
            except Exception:
                if file.error is not None:
                    raise file.error from None
                raise
        return replace(plan.entry, sha256=footer.sha256, num_bytes=footer.num_bytes)

    with _writing:
        temporary, entry = atomic_files.write_beside(plan.path, fill)
    return temporary, plan, entry


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """The bytes of all tensors, the least size of the file."""
    storages = {}
    for tensor in with_memory(tensors):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Leave out the CRC-32 of each tensor in the archive: nobody checks it, and it costs half of the time of a save.

    A `torch.save` of another thread meanwhile leaves it out, too, which `torch.load` accepts.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
