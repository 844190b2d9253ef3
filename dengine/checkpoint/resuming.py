"""Find and load the checkpoint to resume from: the newest intact one in a folder."""

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

__all__ = ["find", "latest", "load_or_miss", "newest_first", "resume"]


def latest(save_dir: str | Path, prefix: str = "checkpoint") -> Path | None:
    """The intact checkpoint of `prefix` in `save_dir` that was saved last; None if there is none.

    On this rank only. Cost: as `verify`, for each file until one is intact.

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
    for _, entry in newest_first(found, prefix):
        path = folder / entry.name
        try:
            verify(path)
        except CheckpointError:
            continue
        return path
    return None


def newest_first(found: manifest.Scan, prefix: str) -> list[tuple[float, Entry]]:
    """Checkpoints of `prefix` by the time at which they were saved, damaged and lost ones included, each with a number
    that is higher for later ones.
    """

    def when(entry: Entry) -> float:
        if entry.sequence >= 0:
            return entry.sequence
        # Only its name is known: it comes right after those with smaller steps.
        earlier = [each.sequence for each in found.entries if (each.step or 0) <= (entry.step or 0)]
        return max(earlier, default=-1) + 0.5

    entries = [each for each in (*found.lost, *found.damaged, *found.entries) if each.prefix == prefix]
    return sorted(((when(each), each) for each in entries), key=lambda pair: pair[0], reverse=True)


def resume(save_dir: str | Path, to_load: Mapping[str, object], prefix: str = "checkpoint") -> Path | None:
    """Load the newest intact checkpoint of `prefix` in `save_dir`, and give its path; None if there is none yet.

    A damaged or lost checkpoint is skipped for the one before it, with a warning on rank 0. One that lacks a name of
    `to_load` (a best model beside the last full state) is skipped silently. If there are only checkpoints of other
    prefixes, a warning on rank 0 names them. Nothing in the folder is changed, except that a sharded checkpoint that
    was being replaced when its run was killed gets back its name.

    Collective, as `load`, once more for each file that is skipped.

    Raises:
        CorruptCheckpointError: there are checkpoints, but none is intact. It would be a surprise to start from scratch.
        CheckpointError: on every rank, if `save_dir` is a checkpoint itself, or no checkpoint has all names; or as in
            `load`.
    """
    folder, mine = path_of("save_dir", save_dir), sorted(check_objects(to_load))
    # With rank 0's names, so that all ranks try the same checkpoints; load() compares the names of the ranks.
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
    # The names in a file without a readable end are unknown: it is tried, and a warning names it.
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
            load_or_miss(folder / entry.name, to_load)
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
    """The checkpoints of `prefix`, newest first, and the other prefixes; or the reason why `folder` is none."""
    found = find(folder)
    if isinstance(found, str):
        return found
    others = sorted({each.prefix for each in (*found.entries, *found.damaged)})
    return [entry for _, entry in newest_first(found, prefix)], others


def find(folder: Path) -> manifest.Scan | str:
    """The content of `folder`; or the reason why it is no folder of checkpoints to resume from. On this rank only."""
    try:
        if (reason := _no_folder_of_checkpoints(folder, "resume")) is not None:
            return reason
        atomic_files.recover(folder)
        return manifest.scan(folder)
    except (OSError, CheckpointError) as error:
        return f"{folder} cannot be read: {error}"


def load_or_miss(path: Path, into: Mapping[str, object]) -> None:
    """Call `load`; a file that no rank finds counts as damaged, one that only some ranks find does not."""
    gone = all_gather_object(not os.path.lexists(path))
    if all(gone):
        raise CorruptCheckpointError(f"{path} is gone, although the manifest lists it.")
    load(path, into)


def _no_folder_of_checkpoints(path: Path, name: str) -> str | None:
    """The reason why `path` is no folder for `name`; None if it is one, or does not exist yet."""
    if path.is_dir():
        is_checkpoint = holds_shards(path)
    elif path.suffix != ".pt" and path.exists():
        return f"{path} is a file, not a folder of checkpoints: {name} takes the folder that they are saved in."
    else:
        is_checkpoint = path.suffix == ".pt"  # also if it does not exist: it would be a surprise to start from scratch
    if not is_checkpoint:
        return None
    return (
        f"{path} is a checkpoint, not a folder of them: {name} takes its folder ({path.parent}); "
        "dengine.checkpoint.load takes the checkpoint itself."
    )
