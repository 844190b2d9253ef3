"""The common part of the formats. A save is `SaveRequest -> plan -> states -> Format.save: write, commit, agree,
prune`.

An asynchronous save is the same, only that write and commit run in a thread.
"""

import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from dengine import atomic_files
from dengine.checkpoint.catalogue import manifest
from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.catalogue.manifest import Scan
from dengine.checkpoint.disk import space
from dengine.checkpoint.disk.background import Writing
from dengine.checkpoint.states.snapshot import Collected, HostCopy
from dengine.comm.outcome import from_rank_zero
from dengine.errors import CheckpointError
from dengine.types import Stateful

if TYPE_CHECKING:
    from dengine.checkpoint.formats.nodes import Nodes

__all__ = [
    "Background",
    "Format",
    "Job",
    "SaveOutcome",
    "SavePlan",
    "SaveRequest",
    "agree",
    "failure_text",
    "publish",
]

T = TypeVar("T")

# The manifest is read, changed and replaced: two threads at once would lose what one of them adds.
_listing = threading.Lock()


@dataclass(frozen=True)
class SaveRequest:
    """A request to save now. `score` is None if the newest checkpoints are kept rather than the best."""

    step: int
    score: float | None


@dataclass(frozen=True)
class SavePlan:
    """The plan of a save: its path, the checkpoints to keep, and those to remove once it is safe.

    Rank 0 makes it from a scan of the folder, which the other ranks do not get.
    """

    path: Path
    entry: Entry
    kept: list[Entry]
    dropped: list[Entry]
    seen: Scan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}


@dataclass(frozen=True)
class SaveOutcome:
    """The outcome of a save, for all ranks: the checkpoints that are kept, the last one, and the failure, if any."""

    kept: list[Entry]
    last: Path | None
    failure: str | None = None


@dataclass(frozen=True)
class Job:
    """A save that a thread writes."""

    writing: Writing[SaveOutcome | None]
    plan: SavePlan


class Background:
    """The thread of asynchronous saves. It writes and commits copies of the states, one save at a time.

    Attributes:
        copies: the copies in host memory, which the next save uses again.
        is_leaving: set if the run ends by an exception, so that nobody waits long for ranks that may be gone.
        job: the current save, until its outcome was read.
    """

    def __init__(self) -> None:
        self.copies = HostCopy()
        self.is_leaving = threading.Event()
        self.job: Job | None = None
        self._has_warned = False

    def start(self, plan: SavePlan, prepare: Callable[[], Callable[[], SaveOutcome | None]]) -> None:
        """Call `prepare`, which copies the states; the function that it gives runs in a thread after
        `job.writing.go()`.
        """
        self.is_leaving.clear()
        self.job = Job(Writing(prepare), plan)

    def expected(self, kept: list[Entry]) -> list[Entry]:
        """The entries of the checkpoints that stay: `kept`, or those after the save under way."""
        return kept if self.job is None else [*self.job.plan.kept, self.job.plan.entry]

    def warn_of_waiting(self) -> None:
        """Warn, once, if the next save must wait for one that is still under way."""
        if self.job is None or self.job.writing.is_done or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"{self.job.plan.path} is still being written, so this save and the training wait for it: the disk is too "
            "slow for saves this often. Save less often. This is said once.",
            stacklevel=2,
        )

    def resolve(self, before: SaveOutcome) -> SaveOutcome:
        """Wait for the thread, and give the outcome of its save; `before` if there is none, or on other ranks than
        0.
        """
        job = self.job
        if job is None:
            return before
        try:
            return job.writing.result() or before
        except Exception as error:
            return replace(before, failure=failure_text(job.plan.path, error))
        finally:
            if job.writing.is_done:  # else the waiting was interrupted, and the thread goes on
                self.job = None


class Format(ABC):
    """A format of checkpoints: writes states to one checkpoint.

    Attributes:
        ending: the ending of the checkpoint's name.
    """

    ending: ClassVar[str]

    @abstractmethod
    def save(
        self,
        path: Path,
        collected: Collected,
        objects: Mapping[str, Stateful],
        plan: Callable[[], SavePlan],
        background: Background | None = None,
        nodes: "Nodes | None" = None,
    ) -> SaveOutcome | None:
        """Write the states that were `collected` from `objects`, commit, and only then prune, by rank 0's `plan()`.

        With `background`, only copy them, and let its thread do the rest; the result is None then. With `nodes`, each
        node plans, writes and prunes in a folder of its own.

        Collective: call on all ranks.

        Raises:
            CheckpointError: on every rank, if it cannot be written; older checkpoints are untouched.
        """


def publish(temporary: Path, plan: SavePlan, entry: Entry) -> SaveOutcome:
    """Give the complete file or folder its name, list it, and only then remove what the plan drops. On this rank only.

    Raises:
        Exception: it cannot be committed; nothing is changed then.
    """
    _commit(temporary, plan, entry)
    _prune(plan.path.parent, plan.dropped)
    return SaveOutcome([*plan.kept, entry], plan.path)


def agree(action: Callable[[], T], path: Path) -> T:
    """Rank 0's result of `action`, on every rank. Collective: one small broadcast.

    Raises:
        CheckpointError: on every rank, if it failed, with the reason.
    """
    return from_rank_zero(action, f"save {path}", lambda error: (CheckpointError, failure_text(path, error)))


def failure_text(path: Path, error: BaseException) -> str:
    return f"{path} could not be saved, and nothing was changed: {type(error).__qualname__}: {error}"


def _commit(temporary: Path, plan: SavePlan, entry: Entry) -> None:
    """Rename the temporary file or folder to its final name, then the new manifest, which lists it and no longer lists
    those that will be removed.

    The manifest is on the disk under a temporary name before either is renamed, so that a full disk fails before
    anything has changed. A failure is undone. An interrupt is not: like a kill, it leaves a complete file, which is
    listed, or found later.
    """
    path, folder = plan.path, plan.path.parent
    with _listing:
        try:
            dropped = {one.name for one in plan.dropped}
            text = manifest.next_manifest(folder, entry, dropped, plan.seen)
            listed, _ = atomic_files.write_beside(
                folder / manifest.FILE_NAME, lambda descriptor: _put(descriptor, text)
            )
        except BaseException:
            _give_up(temporary)
            raise
        is_new = not path.exists()
        try:
            atomic_files.commit(temporary, path)
        except BaseException:
            _give_up(listed)
            raise
        try:
            atomic_files.commit(listed, folder / manifest.FILE_NAME)
        except Exception:
            if is_new:
                _take_back(path)
            raise


def _give_up(temporary: Path) -> None:
    atomic_files.discard(temporary)
    atomic_files.end(temporary)


def _take_back(path: Path) -> None:
    """Remove the file or folder, and the manifest if it lists that already: it will be rebuilt from the files."""
    if manifest.listed_beside(path) is not None:
        atomic_files.discard(path.parent / manifest.FILE_NAME)
    space.remove(path)


def _prune(folder: Path, dropped: Sequence[Entry]) -> None:
    """Remove the files that are no longer needed. Warn of those that cannot be removed; a restart tries again."""
    for one in dropped:
        try:
            space.remove(folder / one.name)
        except OSError as error:
            warnings.warn(f"The superfluous checkpoint {folder / one.name} stays: {error}", stacklevel=2)


def _put(descriptor: int, text: bytes) -> None:
    while text:
        text = text[os.write(descriptor, text) :]
