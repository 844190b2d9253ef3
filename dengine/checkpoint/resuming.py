"""Which checkpoint of a folder to go on from: the newest intact one."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from dengine import atomic_files
from dengine.checkpoint.catalogue import manifest
from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.formats.sharded.verify import holds_shards
from dengine.checkpoint.loading import UnreadableError, agree_on_names, load, verify
from dengine.checkpoint.states.snapshot import check_objects
from dengine.checks import path_of
from dengine.comm.outcome import from_rank_zero
from dengine.distributed import all_gather_object, world
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.naming import printable

__all__ = ["latest", "resume"]


def latest(save_dir: str | Path, prefix: str = "checkpoint") -> Path | None:
    """The intact checkpoint of `prefix` in `save_dir` that was saved last; None if there is none.

    This rank's own. Cost: as `verify`, for each file until one is intact.

    Raises:
        CheckpointError: `save_dir` is a checkpoint itself, or another file.
    """
    folder = path_of("save_dir", save_dir)
    if (reason := _no_folder_of_checkpoints(folder, "latest")) is not None:
        raise CheckpointError(reason)
    try:
        found = manifest.scan(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    for entry in _newest_first(found, prefix):
        path = folder / entry.name
        try:
            verify(path)
        except CheckpointError:
            continue
        return path
    return None


def _newest_first(found: manifest.Scan, prefix: str) -> list[Entry]:
    """Checkpoints of `prefix` by the time they were saved, the damaged and lost ones at the place that was theirs."""

    def when(entry: Entry) -> float:
        if entry.sequence >= 0:
            return entry.sequence
        # Only its name is known: right after those that lead up to it.
        earlier = [each.sequence for each in found.entries if (each.step or 0) <= (entry.step or 0)]
        return max(earlier, default=-1) + 0.5

    entries = [each for each in (*found.lost, *found.damaged, *found.entries) if each.prefix == prefix]
    return sorted(entries, key=when, reverse=True)


def resume(save_dir: str | Path, to_load: Mapping[str, object], prefix: str = "checkpoint") -> Path | None:
    """Load the newest intact checkpoint of `prefix` in `save_dir`; its path, or None if there is nothing yet.

    One that is damaged or lost is passed over for the one before it, with a warning on rank 0. So is, silently, one
    that does not hold all the names of `to_load` (the best model beside the last full state). If there are only those
    of other prefixes, a warning on rank 0 names them. Nothing is changed in the folder, but for a sharded one
    that a kill has left aside while it was replaced: it gets its name again.

    Collective, as `load`, once more for each file that is passed over.

    Raises:
        CorruptCheckpointError: there are checkpoints, but none is intact: to begin anew would be a surprise.
        CheckpointError: on every rank, if `save_dir` is a checkpoint itself, or none holds all the names; or see
            `load`.
    """
    folder, mine = path_of("save_dir", save_dir), sorted(check_objects(to_load))
    # By rank 0's names, so that all ranks try the same ones; load() compares them with those of the others.
    found, names = from_rank_zero(lambda: (_found(folder, prefix), mine), f"look for checkpoints in {folder}")
    if isinstance(found, str):
        raise CheckpointError(found)
    candidates, others = found
    if not candidates and others and world().rank == 0:
        warnings.warn(
            f"{folder} holds no checkpoint {prefix!r}, so the run begins anew; there are some of "
            f"{', '.join(map(repr, others))}, which filename_prefix= would name.",
            stacklevel=3,
        )
    # What a file without a readable end holds is not known: it is tried, and named in a warning.
    fitting = [entry for entry in candidates if not entry.objects or set(names) <= set(entry.objects)]
    if candidates and not fitting:
        agree_on_names(all_gather_object(mine))
        there = "; ".join(f"{entry.name} holds {', '.join(entry.objects)}" for entry in candidates)
        raise CheckpointError(
            f"No checkpoint {prefix!r} in {folder} holds all of {', '.join(names)}: {printable(there)}."
        )
    reasons: list[str] = []
    for entry in fitting:
        try:
            _load_or_miss(folder / entry.name, to_load)
        except (CorruptCheckpointError, UnreadableError) as error:
            reasons.append(str(error))
            continue
        if reasons and world().rank == 0:
            warnings.warn(f"Resuming from {folder / entry.name}, as {printable(' '.join(reasons))}", stacklevel=2)
        return folder / entry.name
    if reasons:
        raise CorruptCheckpointError(
            f"No checkpoint {prefix!r} in {folder} is intact: {' '.join(reasons)} To begin anew, use another folder."
        )
    return None


def _found(folder: Path, prefix: str) -> tuple[list[Entry], list[str]] | str:
    """Those of `prefix`, newest first, and which other prefixes there are; or why that is no folder to look into."""
    try:
        if (reason := _no_folder_of_checkpoints(folder, "resume")) is not None:
            return reason
        atomic_files.recover(folder)
        found = manifest.scan(folder)
    except (OSError, CheckpointError) as error:
        return f"{folder} cannot be read: {error}"
    return _newest_first(found, prefix), sorted({each.prefix for each in (*found.entries, *found.damaged)})


def _load_or_miss(path: Path, into: Mapping[str, object]) -> None:
    """`load`; a file that is gone for every rank counts as damaged, one that only some see does not."""
    gone = all_gather_object(not os.path.lexists(path))
    if all(gone):
        raise CorruptCheckpointError(f"{path} is gone, though the manifest lists it.")
    load(path, into)


def _no_folder_of_checkpoints(path: Path, name: str) -> str | None:
    """Why `path` is no folder that `name` can look into; None if it is one, or is not there yet."""
    if path.is_dir():
        is_checkpoint = holds_shards(path)
    elif path.suffix != ".pt" and path.exists():
        return f"{path} is a file, not a folder of checkpoints: {name} takes the folder that they are saved in."
    else:
        is_checkpoint = path.suffix == ".pt"  # also one that is not there: beginning anew would be a surprise
    if not is_checkpoint:
        return None
    return (
        f"{path} is a checkpoint, not a folder of them: {name} takes its folder ({path.parent}); "
        "dengine.checkpoint.load takes the checkpoint itself."
    )
