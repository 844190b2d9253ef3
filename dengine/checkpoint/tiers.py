"""Resume from the newest checkpoint in several folders, of which some may be each node's own (`placement="node"`)."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dengine.checkpoint.catalogue import manifest
from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.disk.owner import is_owned, take_over
from dengine.checkpoint.fetching import fetch
from dengine.checkpoint.loading import UnreadableError, agree_on_names, verify
from dengine.checkpoint.resuming import find, load_or_miss, newest_first
from dengine.checkpoint.states.snapshot import check_objects
from dengine.checks import path_of
from dengine.comm.outcome import on_all_ranks
from dengine.distributed import world
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.naming import printable

__all__ = ["resume_newest"]


class _Tier(NamedTuple):
    """A folder to resume from, as this rank knows it, and the prefix of the checkpoints there."""

    folder: Path
    prefix: str


class _View(NamedTuple):
    """What a rank sees: the names that it loads and, if it is the first of its node, the checkpoints of each tier with
    how old each is (higher is newer) and whether it seems intact; other prefixes; and tiers that share a disk.
    """

    names: list[str]
    tiers: list[list[tuple[float, Entry, bool]]] | None
    others: list[str]
    same_disk: str


@dataclass
class _Candidate:
    """One checkpoint of a tier, and the first ranks of the nodes that have it."""

    tier: int
    entry: Entry
    age: float
    holders: list[int] = field(default_factory=list)


def resume_newest(
    folders: Sequence[str | Path | tuple[str | Path, str]], to_load: Mapping[str, object], prefix: str
) -> Path | None:
    """Load the newest intact checkpoint in any of `folders`, and give its path on this node; None if there is none yet.

    Newest is, within a folder, what was saved last; between folders, the highest step, and of equals the first.
    What only some nodes have, or have intact, is sent to the others, which keep it in their folder of that place.

    Collective. Cost: one gather of the names of what there is; then as `load`, once more for each that is skipped.
    If a node lacks it, it is also verified first, and broadcast.

    Raises:
        CorruptCheckpointError, CheckpointError: as `resume`; and if a folder is in use by another job.
    """
    tiers, mine = _tiers(folders, prefix), sorted(check_objects(to_load))
    shown = ", ".join(map(str, dict.fromkeys(tier.folder for tier in tiers)))
    views = on_all_ranks(lambda: _view(tiers, mine), f"look for checkpoints in {shown}", _as_checkpoint_error)
    agree_on_names([view.names for view in views])
    is_first = world().rank == 0
    if is_first and views[0].same_disk:
        warnings.warn(views[0].same_disk, stacklevel=3)
    candidates = list(_newest_of_all(views, len(tiers)))
    if not candidates and views[0].others and is_first:
        warnings.warn(
            f"{shown} hold no checkpoint {prefix!r}, so the run begins anew; there are some of "
            f"{', '.join(map(repr, views[0].others))}, which filename_prefix= would name.",
            stacklevel=3,
        )
    fitting = [each for each in candidates if not each.entry.objects or set(mine) <= set(each.entry.objects)]
    if candidates and not fitting:
        there = "; ".join(f"{each.entry.name} holds {', '.join(each.entry.objects)}" for each in candidates)
        raise CheckpointError(f"No checkpoint in {shown} holds all of {', '.join(mine)}: {printable(there)}.")
    keepers = [rank for rank, view in enumerate(views) if view.tiers is not None]
    reasons: list[str] = []
    for candidate in fitting:
        path = tiers[candidate.tier].folder / candidate.entry.name
        try:
            reasons += _load(path, candidate, keepers, to_load)
        except (CorruptCheckpointError, UnreadableError) as error:
            reasons.append(str(error))
            continue
        if reasons and is_first:
            warnings.warn(f"Resuming from {path}, as {printable(' '.join(reasons))}", stacklevel=3)
        return path
    if reasons:
        raise CorruptCheckpointError(
            f"No checkpoint in {shown} is intact: {' '.join(reasons)} To begin anew, use other folders."
        )
    return None


def _tiers(folders: object, prefix: str) -> list[_Tier]:
    if not isinstance(folders, Sequence) or not folders:
        raise TypeError(f"save_dir={folders!r} must be a folder, or a list of folders such as [fast_dir, safe_dir].")
    tiers = []
    for given in folders:
        folder, own = given if isinstance(given, tuple) and len(given) == 2 else (given, prefix)
        if not isinstance(own, str):
            raise TypeError(f"{given!r} in save_dir must be a folder, or a pair (folder, filename_prefix).")
        tiers.append(_Tier(path_of("save_dir", folder), own))
    return tiers


def _as_checkpoint_error(error: Exception) -> tuple[type[Exception], str]:
    here = world()
    return CheckpointError, f"On node {here.node_rank} (rank {here.rank}), {error}"


def _view(tiers: Sequence[_Tier], names: list[str]) -> _View:
    """
    Raises:
        CheckpointError: a tier is no folder of checkpoints, or in use by another job.
    """
    if world().local_rank != 0:
        return _View(names, None, [], "")
    found: list[list[tuple[float, Entry, bool]]] = []
    others: set[str] = set()
    for folder, prefix in tiers:
        if is_owned(folder):
            take_over(folder)
        seen = find(folder)
        if isinstance(seen, str):
            raise CheckpointError(seen)
        found.append([(age, entry, entry in seen.entries) for age, entry in newest_first(seen, prefix)])
        others.update(entry.prefix for entry in (*seen.entries, *seen.damaged))
    return _View(names, found, sorted(others), _same_disk(tiers) if world().rank == 0 else "")


def _newest_of_all(views: Sequence[_View], num_tiers: int) -> Iterator[_Candidate]:
    """The candidates of all tiers, newest first."""
    waiting = [_of_tier(views, tier) for tier in range(num_tiers)]
    while any(waiting):
        heads = [(tier[0].entry.step or -1, -number) for number, tier in enumerate(waiting) if tier]
        yield waiting[-max(heads)[1]].pop(0)


def _of_tier(views: Sequence[_View], tier: int) -> list[_Candidate]:
    found: dict[tuple[str, str], _Candidate] = {}
    broken: dict[str, _Candidate] = {}
    for rank, view in enumerate(views):
        for age, entry, seems_intact in () if view.tiers is None else view.tiers[tier]:
            if not seems_intact:
                broken.setdefault(entry.name, _Candidate(tier, entry, age))
                continue
            known = found.setdefault((entry.name, entry.sha256), _Candidate(tier, entry, age))
            known.age = max(known.age, age)
            known.holders.append(rank)
    names = {name for name, _ in found}
    only_broken = [each for name, each in broken.items() if name not in names]
    return sorted([*found.values(), *only_broken], key=_age_and_step, reverse=True)


def _age_and_step(candidate: _Candidate) -> tuple[float, int]:
    return candidate.age, -1 if candidate.entry.step is None else candidate.entry.step


def _load(path: Path, candidate: _Candidate, keepers: Sequence[int], to_load: Mapping[str, object]) -> list[str]:
    """Load `path`, after those nodes have got it that lack it; gives what was wrong with copies. Collective.

    Raises:
        CorruptCheckpointError, UnreadableError: no node has it intact.
    """
    problems: list[str] = []
    if candidate.holders == list(keepers) or not candidate.holders:
        try:
            load_or_miss(path, to_load)
            return problems
        except (CorruptCheckpointError, UnreadableError) as error:
            if len(candidate.holders) < 2:
                raise
            problems.append(str(error))
    # The digests of all, so that what is sent is intact.
    reports = on_all_ranks(lambda: _problem(path, candidate), f"verify {path}")
    intact = [rank for rank in candidate.holders if not reports[rank]]
    problems = problems or [text for text in reports if text]
    if not intact or len(intact) == len(keepers):
        raise CorruptCheckpointError(" ".join(problems))
    fetch(path, candidate.entry, source=intact[0], to=[rank for rank in keepers if rank not in intact])
    load_or_miss(path, to_load)
    return problems


def _problem(path: Path, candidate: _Candidate) -> str:
    """What is wrong with the copy of this rank's node; "" if nothing is, or it has none."""
    if world().rank not in candidate.holders:
        return ""
    try:
        verify(path)
    except CheckpointError as error:
        return str(error)
    return ""


def _same_disk(tiers: Sequence[_Tier]) -> str:
    """A warning if a folder of nodes' own copies lies on the file system of another one; else ""."""
    folders = list(dict.fromkeys(tier.folder for tier in tiers))
    for fast in folders:
        if fast.exists() and not is_owned(fast) and manifest.scan(fast).has_any:
            continue  # not one for copies
        for safe in folders:
            if safe != fast and _disk(fast) == _disk(safe):
                return (
                    f"{fast} and {safe} are on one file system, so saving into one is no faster than into the other, "
                    "and both are lost together: keep the nodes' own copies in memory, such as in /dev/shm."
                )
    return ""


def _disk(folder: Path) -> int:
    folder = Path(os.path.abspath(folder))
    while not folder.exists():
        folder = folder.parent
    return os.stat(folder).st_dev
