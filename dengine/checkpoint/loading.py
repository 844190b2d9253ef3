"""Load one checkpoint: verify it, and give its states to the objects of every rank."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import torch

from dengine.checkpoint.catalogue import manifest
from dengine.checkpoint.catalogue.entry import Entry, from_footer
from dengine.checkpoint.disk.archive import check_archive
from dengine.checkpoint.disk.footer import check_footer, read_footer
from dengine.checkpoint.disk.regular import open_regular
from dengine.checkpoint.formats.folder import numbered, read_folder
from dengine.checkpoint.formats.sharded.verify import holds_shards
from dengine.checkpoint.states.external_state import refuse_to_load
from dengine.checkpoint.states.partial import Fitting, LeftOut
from dengine.checkpoint.states.parts import refuse_other_parts
from dengine.checkpoint.states.plain import check_loaded
from dengine.checkpoint.states.restore import Restoring, give_random_states
from dengine.checkpoint.states.snapshot import RANDOM, RESERVED, States, check_objects, unwrapped
from dengine.checks import path_of
from dengine.distributed import all_gather_object, world
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.types import Stateful

__all__ = ["UnreadableError", "agree_on_names", "load", "verify"]


def verify(path: str | Path) -> Entry:
    """Check every byte of the file or folder `path`, and give its description: step, score, versions, ...

    On this rank only. Cost: it is read once (SHA-256, about 1 GB/s); nothing in it is executed.

    Raises:
        CorruptCheckpointError: it is truncated or was changed. CheckpointError: it does not exist, cannot be read, or
            is a folder of checkpoints.
    """
    path = path_of("path", path)
    try:
        entry = manifest.entry_of(path, proven=True)
        manifest.refuse_other(entry, path)
        return entry
    except CorruptCheckpointError as error:
        raise _explained(error, path) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


@overload
def load(path: str | Path, into: Mapping[str, object], *, partial: Literal[False] = False) -> None: ...


@overload
def load(path: str | Path, into: Mapping[str, object], *, partial: bool) -> LeftOut | None: ...


def load(path: str | Path, into: Mapping[str, object], *, partial: bool = False) -> LeftOut | None:
    """Load the states in `path` into the objects of `into`, by name, on every rank: into all of them or none.

    Only verified bytes are used. One rank of each node reads a whole file and compares it with its digest; every rank
    loads from the file that it opened before that, and all must see the same file. From a folder (sharded models), each
    rank reads and verifies the parts that it needs; the objects may be sharded over another number of ranks, or not at
    all; an optimizer finds its state by the names in its model, which must be in `into`, too. Nothing that is read is
    executed. DDP and `torch.compile` wrappers do not matter; names in `path` that are not in `into` are skipped. An
    object that carries random number generators (an engine) gets those of this rank.

    With `partial`, states that fit by name and shape are loaded, and the rest stays as it is: for a model that has
    another head now, for example. An optimizer is loaded completely or not at all.

    Collective: call on all ranks. Cost: a file is read once by each rank and once more on each node, then from the
    page cache; one SHA-256 of it; two small gathers; host memory for the states, and for those that they replace. For a
    folder, each rank reads its part; four small gathers; memory for that part twice.

    Returns: with `partial`, the names that were left out on either side; else None.

    Raises:
        TypeError, ValueError: `into` is no dict of objects with a `state_dict`, or `path` is no path.
        CorruptCheckpointError: on every rank, if it is damaged on one, or is not the file that the manifest lists.
        CheckpointError: on every rank, if one does not find it or sees another file, if it is a folder of checkpoints,
            if a rank asks for other names than rank 0, or if an object refuses its state (missing and extra names are
            listed); every object is then as it was.

    Example:
        >>> import tempfile, torch
        >>> from dengine.checkpoint import save
        >>> path = Path(tempfile.mkdtemp(), "model_5.pt")
        >>> save(path, {"model": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 10))})
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 5))
        >>> load(path, {"model": model}, partial=True).missing_keys
        ['model/1.weight', 'model/1.bias']
    """
    targets, path = check_objects(into), path_of("path", path)
    fitting = Fitting() if partial else None
    with ExitStack() as stack:
        file, seen = _open(path, stack)
        everyone = all_gather_object((sorted(targets), seen))
        agree_on_names([names for names, _ in everyone])
        _agree_on_file(path, [theirs for _, theirs in everyone])
        wanted = targets if fitting is None or file is not None else _there(seen.objects, targets, fitting)
        states = read_folder(path, wanted) if file is None and wanted else {}
        restoring = Restoring(targets, fitting)
        failure, cause, kind = None, None, CheckpointError
        try:
            refuse_to_load(unwrapped(targets))
            states = _numbered(states, wanted, fitting) if file is None else _read_file(file)
            if fitting is not None:
                wanted = _there(list(states), wanted, fitting if file is not None else None)
                restoring = Restoring(wanted, fitting)
            else:
                refuse_other_parts(targets, states, is_file=file is not None)
            restoring.load(states)
        except Exception as error:
            failure, cause = f"{type(error).__qualname__}: {error.args[0] if error.args else error}", error
            if isinstance(error, _UnusableError):
                failure, kind = str(error), CorruptCheckpointError
        failures = all_gather_object((failure, kind))
        refusing = [rank for rank, (reason, _) in enumerate(failures) if reason is not None]
        if refusing:
            restoring.undo()
            reason, kind = failures[refusing[0]]
            raise kind(
                f"{path} could not be loaded on rank {refusing[0]} of {len(failures)}, and every object is as it was: "
                f"{reason}"
            ) from cause
        give_random_states(states, wanted)
    return None if fitting is None else fitting.left_out


def _there(saved: Sequence[str], targets: dict[str, Stateful], fitting: Fitting | None) -> dict[str, Stateful]:
    """The `targets` that are among the `saved` names; the other names are noted, on either side."""
    if fitting is not None:
        fitting.left_out.missing_keys.extend(name for name in targets if name not in saved)
        fitting.left_out.unexpected_keys.extend(name for name in saved if name not in targets and name != RESERVED)
    return {name: value for name, value in targets.items() if name in saved}


def _numbered(states: States, into: dict[str, Stateful], fitting: Fitting | None) -> States:
    """The states as `numbered` gives them; with `fitting`, an optimizer with other parameters is left out."""
    if fitting is None:
        return numbered(states, into)
    loadable = {RESERVED: states[RESERVED]} if RESERVED in states else {}
    for name in into:
        try:
            loadable[name] = numbered(states, into, [name])[name]
        except ValueError:
            fitting.leave(name)
    return loadable


class UnreadableError(CheckpointError):
    """A file exists, but cannot be read: this process may not, or the disk fails."""


class _UnusableError(Exception):
    """A complete file has content that cannot be states."""


def _read_file(file: BinaryIO) -> States:
    """The states in an opened file.

    Raises:
        _UnusableError: it is no file of `torch.save`, or holds something other than states.
    """
    try:
        check_archive(file)
        file.seek(0)
        states = torch.load(file, map_location="cpu", weights_only=True)
        check_loaded(states)
        _check_reserved(states.get(RESERVED, {}))
    except OSError:
        raise
    except Exception as error:
        raise _UnusableError(f"{type(error).__qualname__}: {error.args[0] if error.args else error}") from error
    return states  # type: ignore[no-any-return]


def _check_reserved(entry: Any) -> None:
    of_ranks = entry.get(RANDOM, {}) if isinstance(entry, dict) else None
    if not isinstance(of_ranks, dict) or not all(
        isinstance(each, list) and all(isinstance(one, dict) for one in each) for each in of_ranks.values()
    ):
        raise ValueError(f"its entry {RESERVED!r} is not as it is written")


@dataclass(frozen=True)
class _Seen:
    """The file or folder that one rank sees under a path."""

    sha256: str = ""
    objects: tuple[str, ...] = ()  # in a folder
    missing: str | None = None
    corrupt: CheckpointError | None = None
    other: str | None = None  # the reason if it is another file than was saved


def _open(path: Path, stack: ExitStack) -> tuple[BinaryIO | None, _Seen]:
    """The file, kept open so that the verified file is loaded, even if it is replaced meanwhile.

    None for a folder: its parts are verified when they are read, with digests that are the same for all ranks.
    """
    try:
        if path.is_dir():
            entry = manifest.entry_of(path)
            return None, _Seen(entry.sha256, entry.objects, other=_other(entry, path))
        file = stack.enter_context(open_regular(path))
        # The ranks of a node read the same pages: the first one checks them for all.
        footer = check_footer(file, path) if world().local_rank == 0 else read_footer(file, path)
        entry = from_footer(footer, path)
    except CorruptCheckpointError as error:
        return None, _Seen(corrupt=_explained(error, path))
    except FileNotFoundError as error:
        return None, _Seen(missing=str(error))
    except OSError as error:
        return None, _Seen(corrupt=UnreadableError(f"{path} cannot be read: {error}."))
    return file, _Seen(sha256=footer.sha256, other=_other(entry, path))


def _other(entry: Entry, path: Path) -> str | None:
    """The reason if it is another file than was saved under its name; else None."""
    try:
        manifest.refuse_other(entry, path)
    except CorruptCheckpointError as error:
        return str(error)
    return None


def agree_on_names(names: Sequence[list[str]]) -> None:
    for rank, theirs in enumerate(names):
        if theirs != names[0]:
            here, on_zero = (" and ".join(each) for each in (theirs, names[0]))
            raise CheckpointError(
                f"Nothing was loaded, since rank {rank} asks for {here}, rank 0 for {on_zero}: give the same names on "
                "all ranks."
            )


def _agree_on_file(path: Path, seen: Sequence[_Seen]) -> None:
    """Raise the same error on every rank if one of them sees no file, a damaged one, or another one."""
    for rank, each in enumerate(seen):
        if each.missing is not None:
            raise CheckpointError(
                f"Rank {rank} of {len(seen)} cannot read {path}: {each.missing}. A checkpoint is loaded on every rank, "
                "so all nodes must see its folder."
            )
    for rank, each in enumerate(seen):
        if each.corrupt is not None:
            raise type(each.corrupt)(f"{each.corrupt}" + (f" (seen by rank {rank})" if len(seen) > 1 else ""))
    for rank, each in enumerate(seen):
        if each.sha256 != seen[0].sha256:
            raise CheckpointError(
                f"Rank {rank} sees another file under {path} than rank 0: all nodes must see the same folder."
            )
    if (other := next((each.other for each in seen if each.other is not None), None)) is not None:
        raise CorruptCheckpointError(other)


def _explained(error: CorruptCheckpointError, path: Path) -> CheckpointError:
    """The error, with the size in the manifest; or an error that says that `path` is a folder of checkpoints."""
    with suppress(OSError):
        if path.is_dir() and not holds_shards(path) and manifest.scan(path).has_any:
            return CheckpointError(
                f"{path} is a folder of checkpoints, not a checkpoint: Checkpoint.resume({str(path)!r}, ...) loads the "
                "newest intact one, and dengine.checkpoint.latest() gives its path."
            )
        listed = manifest.listed_beside(path)
        size = path.stat().st_size
        if listed is not None and path.is_file() and listed.num_bytes != size:
            return CorruptCheckpointError(f"{error} The manifest knows it with {listed.num_bytes} bytes.")
    return error
