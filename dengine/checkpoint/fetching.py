"""Send a checkpoint from a node that has it to nodes that do not."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from dengine import atomic_files
from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.disk.owner import is_owned, take_over
from dengine.checkpoint.disk.regular import open_regular
from dengine.checkpoint.formats.base import SavePlan, publish
from dengine.comm.outcome import on_all_ranks
from dengine.distributed import broadcast_object, world
from dengine.errors import CheckpointError

__all__ = ["fetch"]

_PART_BYTES = 16 << 20


def fetch(path: Path, entry: Entry, *, source: int, to: Sequence[int]) -> None:
    """Write the checkpoint `path` of rank `source` on the ranks `to`, each under its own `path`, and list it there.

    Collective. Cost: broadcasts of 16 MB to all ranks, since a group of some would take longer to make.

    Raises:
        CheckpointError: on every rank, if it cannot be read or written.
    """
    rank, problems = world().rank, list[str]()
    temporary = atomic_files.temporary_path(path)
    is_owned_there, is_folder = broadcast_object((is_owned(path.parent), path.is_dir()), source)
    parts = _Parts(path if rank == source else None)
    if rank in to:
        atomic_files.begin(temporary)
    try:
        if rank in to:
            _note(problems, lambda: _prepare(temporary, is_owned=is_owned_there, is_folder=is_folder))
        while (part := broadcast_object(parts.next(), source)) is not None:
            if rank in to and not problems:
                _note(problems, partial(_append, temporary / part[0] if is_folder else temporary, part[1]))
        on_all_ranks(lambda: _refuse(problems + parts.problems), f"send {path}", _as_checkpoint_error)
        if rank in to:
            _note(problems, lambda: _keep(temporary, path, entry))
        on_all_ranks(lambda: _refuse(problems), f"send {path}", _as_checkpoint_error)
    finally:
        if rank in to:
            atomic_files.discard(temporary)
            atomic_files.end(temporary)


class _Parts:
    """The files of a checkpoint, in parts of `(name, bytes)`; none if there is no path, or after a failure."""

    def __init__(self, path: Path | None) -> None:
        self._parts = iter(()) if path is None else self._read(path)
        self.problems: list[str] = []

    def next(self) -> tuple[str, bytes] | None:
        found: list[tuple[str, bytes]] = []
        _note(self.problems, lambda: found.extend(islice(self._parts, 1)))
        return found[0] if found else None

    def _read(self, path: Path) -> Iterator[tuple[str, bytes]]:
        for each in sorted(path.iterdir()) if path.is_dir() else [path]:
            with open_regular(each) as file:
                while content := file.read(_PART_BYTES):
                    yield each.name, content


def _note(problems: list[str], action: Callable[[], object]) -> None:
    try:
        action()
    except (OSError, CheckpointError) as error:
        problems.append(str(error))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise CheckpointError("; ".join(problems))


def _as_checkpoint_error(error: Exception) -> tuple[type[Exception], str]:
    here = world()
    return CheckpointError, f"A checkpoint could not be sent to node {here.node_rank} (rank {here.rank}): {error}"


def _prepare(temporary: Path, *, is_owned: bool, is_folder: bool) -> None:
    if is_owned:
        take_over(temporary.parent)
    atomic_files.make_folder(temporary.parent)
    atomic_files.remove_leftovers(temporary.parent)
    if is_folder:
        temporary.mkdir()


def _append(path: Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)


def _keep(temporary: Path, path: Path, entry: Entry) -> None:
    for each in [*temporary.iterdir(), temporary] if temporary.is_dir() else [temporary]:
        atomic_files.sync(each)
    publish(temporary, SavePlan(path, entry, kept=[], dropped=[]), entry)
