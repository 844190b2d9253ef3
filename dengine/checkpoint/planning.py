"""Plan a save on rank 0: the name of the new checkpoint, and the old ones to remove.

Two writers of one folder (a job started twice, for example) are found here, too.
"""

import itertools
import os
import socket
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from dengine.checkpoint.catalogue import manifest
from dengine.checkpoint.catalogue.entry import Entry, from_name
from dengine.checkpoint.catalogue.retention import to_drop
from dengine.checkpoint.formats.base import SavePlan, SaveRequest
from dengine.errors import CheckpointError
from dengine.version import __version__

__all__ = ["Planner", "plan_alone"]

_count = itertools.count(1)
_WAY_OUT = "Give each job, and each Checkpoint of a job, its own folder or filename_prefix."


def plan_alone(path: Path, objects: Iterable[str], num_ranks: int) -> SavePlan:
    """The plan of one save to `path` that keeps all others."""
    found = from_name(path)
    prefix, step = (path.stem, None) if found is None else (found.prefix, found.step)
    seen = manifest.scan(path.parent)
    entry = Entry(
        path.name,
        prefix,
        step=step,
        score=None,
        score_name=None,
        sequence=seen.next_sequence,
        objects=tuple(objects),
        world_size=num_ranks,
        versions=_versions(),
    )
    return SavePlan(path, entry, kept=[], dropped=[], seen=seen)


def _versions() -> dict[str, str]:
    return {"dengine": __version__, "torch": str(torch.__version__)}


class Planner:
    """Plans the saves of one writer into `folder`, which prunes only files with its `prefix` and `score_name`.

    It remembers the files that it has seen there, so that it notices those of another writer.
    """

    def __init__(
        self, folder: Path, prefix: str, score_name: str | None, n_saved: int, *, is_nodes_own: bool = False
    ) -> None:
        """`is_nodes_own`: each node plans for its own folder, which nobody else writes, and prunes what is there.

        Raises: TypeError, ValueError: `prefix` or `score_name` cannot be part of a file's name.
        """
        _check_names(prefix, score_name)
        self._folder, self._prefix, self._score_name, self._n_saved = folder, prefix, score_name, n_saved
        self._is_nodes_own = is_nodes_own
        self._process = f"{socket.gethostname()} {os.getpid()}"
        self._writer = f"{self._process} {next(_count)}"  # it is in the entry of each checkpoint
        self._made_s = time.time()
        self._seen: dict[str, str] = {}  # name -> digest
        self._has_warned = False

    def first_look(self) -> list[Entry]:
        """The checkpoints that an earlier run has left, without those that another process has saved since this one
        started.

        Only processes on this host are noticed at once, as clocks of hosts may differ; others are from the next save
        on.
        """
        found = self._own(manifest.scan(self._folder).entries)
        earlier = [entry for entry in found if not self._is_new(entry)]
        self._seen = {entry.name: entry.sha256 for entry in earlier}
        return earlier

    def warn_of_later(self, found: Sequence[Entry], step: int) -> None:
        """Warn if an earlier run has left checkpoints with later steps than this run's present one."""
        later = [each.name for each in found if each.step is not None and each.step > step]
        if later and self._score_name is None:
            warnings.warn(
                f"{self._folder} holds checkpoints that are ahead of this run's step {step}: {', '.join(later)}. "
                "They count as older than what this run saves. To go on from them, call Checkpoint.resume(); to keep "
                "them, use another folder or filename_prefix.",
                stacklevel=2,
            )

    def plan(
        self, path: Path, request: SaveRequest, kept: Sequence[Entry], objects: Iterable[str], num_ranks: int
    ) -> SavePlan:
        """The plan of a save to `path`; `kept` are the earlier checkpoints that are still there, as rank 0 knows them.

        Raises:
            CheckpointError: another process has saved `path` since this one started.
        """
        seen = manifest.scan(self._folder)
        if self._is_nodes_own:
            kept = self._own(seen.entries)
        else:
            self._look_for_others(path, self._own(seen.entries))
        entry = Entry(
            path.name,
            self._prefix,
            step=request.step,
            score=request.score,
            score_name=self._score_name,
            sequence=seen.next_sequence,
            objects=tuple(objects),
            world_size=num_ranks,
            versions=_versions(),
            writer=self._writer,
        )
        dropped = to_drop(kept, entry, self._n_saved)
        stay = [each for each in kept if each not in dropped and each.name != entry.name]
        return SavePlan(path, entry, stay, dropped, seen)

    def _own(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries with this writer's prefix and score name (or, like this writer, without a score)."""
        return [each for each in entries if each.prefix == self._prefix and each.score_name == self._score_name]

    def _look_for_others(self, path: Path, entries: Sequence[Entry]) -> None:
        """Warn, once, if another writer has saved some of the `entries`, and refuse to replace such a file."""
        strange = [entry for entry in entries if self._is_strange(entry)]
        if not strange:
            return
        who = ", ".join(sorted({_shown(entry.writer) for entry in strange}))
        if any(entry.name == path.name and not self._is_of_this_process(entry) for entry in strange):
            raise CheckpointError(f"it was saved meanwhile by another job ({who}), which needs it. {_WAY_OUT}")
        self._seen.update((entry.name, entry.sha256) for entry in strange)
        if not self._has_warned:
            self._has_warned = True
            names = ", ".join(entry.name for entry in strange)
            warnings.warn(
                f"Something else ({who}) saves into {self._folder} under the prefix {self._prefix!r}: {names}. "
                f"Each may replace or remove what the other needs. {_WAY_OUT} This is said once.",
                stacklevel=2,
            )

    def _is_strange(self, entry: Entry) -> bool:
        """Whether another writer has saved it. checkpoint.save() and the first versions left no writer's name."""
        return entry.writer not in ("", self._writer) and self._seen.get(entry.name) != entry.sha256

    def _is_of_this_process(self, entry: Entry) -> bool:
        return entry.writer.rpartition(" ")[0] == self._process

    def _is_new(self, entry: Entry) -> bool:
        host = self._process.partition(" ")[0]
        if entry.writer.partition(" ")[0] != host or self._is_of_this_process(entry):
            return False
        try:
            return os.stat(self._folder / entry.name).st_mtime > self._made_s
        except OSError:
            return False


def _shown(writer: str) -> str:
    host, _, rest = writer.partition(" ")
    return f"process {rest.partition(' ')[0]} on {host}"


def _check_names(filename_prefix: str, score_name: str | None) -> None:
    parts = {"filename_prefix": filename_prefix, "score_name": "" if score_name is None else score_name}
    for argument, part in parts.items():
        if not isinstance(part, str):
            raise TypeError(f"{argument}={part!r} becomes part of a file's name, so it must be a string.")
        if "/" in part or "\0" in part:
            raise ValueError(f"{part!r} becomes part of a file's name, so it cannot hold a slash.")
    if not filename_prefix or filename_prefix.startswith("."):
        raise ValueError(f"filename_prefix={filename_prefix!r} must be a name that is not hidden.")
