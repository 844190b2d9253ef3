"""One run of an engine, as its loop sees it, and the runs that are under way on this rank."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Literal, TypeAlias

from dengine.control.ddp_errors import explain
from dengine.control.failure import Level

__all__ = ["END", "Key", "OwnRun", "Run", "Runs", "Scope", "Where", "position"]

Scope: TypeAlias = Literal["run", "epoch"]
Key: TypeAlias = tuple[Scope, int]  # the scope to leave, and its epoch (0 for a run)
Where: TypeAlias = Callable[[Iterable[FrameType]], list[Level]]  # the positions of the engines that run in some frames

_EPOCH_BITS = 40
END = (1 << _EPOCH_BITS) - 1  # as an iteration: the end of the epoch, with its metrics and EPOCH_COMPLETED


def position(epoch: int, iteration: int) -> int:
    """A position in a run, as one number that grows: `iteration` of `epoch`, from 1; 0 is before the first."""
    return (epoch << _EPOCH_BITS) + iteration


class Run(ABC):
    """One run of an engine: how far it has started, and how far it may go.

    Attributes:
        started: the furthest position that the loop may have started; negative before the run has begun.
        iteration: the iterations done over the whole training, with which `started` grows. The loop writes it in every
            iteration, before it checks whether it may go on.
        stop_at: the iteration at which the loop checks whether it may go on: one comparison for all reasons to stop.
            The loop sets it, and any thread may set it to 0 (`interrupt`).
        number: the number of the run among those that all ranks share; None for this rank's own.
        reason: the reason why the run is left, from the rank that asked first.
    """

    def __init__(self, runs: Runs, number: int | None = None) -> None:
        self.iteration = 0
        self._started_at_zero = -1  # `started` minus `iteration`, which any thread may read
        self.stop_at = sys.maxsize
        self.number = number
        self.reason = ""
        self._runs = runs
        self._targets: dict[Key, int] = {}

    @property
    def started(self) -> int:
        while True:  # the loop may enter another epoch between the two reads
            at_zero, iteration = self._started_at_zero, self.iteration
            if at_zero is self._started_at_zero:
                return at_zero + iteration

    @started.setter
    def started(self, value: int) -> None:
        self._started_at_zero = value - self.iteration

    def begin_at(self, iteration: int) -> None:
        """Set the iterations that were done before the run."""
        self._started_at_zero = -1 - iteration  # first: `started` stays negative
        self.iteration = iteration

    def interrupt(self) -> None:
        """Make the loop check whether it may go on, after the current iteration."""
        self.stop_at = 0

    def set_target(self, key: Key, target: int, reason: str = "") -> None:
        """Set the position at which `key` is left, unless it is set already."""
        self._targets.setdefault(key, target)
        self.reason = self.reason or reason

    def end(self) -> None:
        """Note that the loop is over, so that no rank waits for this run any more."""
        self.note_batches(END)
        self._runs.end(self)

    @property
    @abstractmethod
    def depth(self) -> int:
        """The number of shared runs that are under way on this rank, this one included; 1 if they are not counted."""

    @property
    @abstractmethod
    def must_check(self) -> bool:
        """Whether the loop must check: a stop was requested or decided, or a rank has failed."""

    @abstractmethod
    def request_stop(self, scope: Scope, epoch: int, reason: str = "") -> None:
        """Ask all ranks to leave the run or the epoch. `interrupt` tells the loop.

        Raises: LaunchError: the store is gone, so the others cannot be asked.
        """

    @abstractmethod
    def stop_targets(self, epoch: int) -> tuple[int, int | None]:
        """The furthest positions that may be started: in the run, and in `epoch` if that is to be left (else None).

        Waits while a stop request is being decided.

        Raises:
            RemoteRankError, StallError: a rank has failed. LaunchError: the other ranks cannot be reached.
        """

    @abstractmethod
    def failed(self, error: BaseException) -> BaseException:
        """Report `error`, which leaves the run, to the other ranks; gives what to raise for it."""

    @abstractmethod
    def note_batches(self, epoch: int) -> None:
        """Note that this rank had a batch in `epoch`, which it leaves. Cost: a request to the store, if a rank
        asked.
        """

    @abstractmethod
    def has_any_rank_batches(self, epoch: int) -> bool:
        """Whether any rank has a batch in `epoch`, in which this one has none. Waits until that is known.

        True if it cannot be known, as the run is being left. A rank with batches pays nothing unless another rank asks.
        Raises: RemoteRankError, StallError: a rank has failed. LaunchError: the store is gone.
        """

    @abstractmethod
    def wake(self) -> None:
        """Wake up a loop that waits for a decision."""


class OwnRun(Run):
    """A run of this rank alone, as all are in a world of one: every request is granted at once."""

    depth = 1

    @property
    def must_check(self) -> bool:
        return bool(self._targets)

    def request_stop(self, scope: Scope, epoch: int, reason: str = "") -> None:
        self.set_target((scope, epoch if scope == "epoch" else 0), self.started, reason)
        self.interrupt()

    def stop_targets(self, epoch: int) -> tuple[int, int | None]:
        return self._targets.get(("run", 0), sys.maxsize), self._targets.get(("epoch", epoch))

    def failed(self, error: BaseException) -> BaseException:
        explain(error)
        return error

    def note_batches(self, epoch: int) -> None:
        pass

    def has_any_rank_batches(self, epoch: int) -> bool:
        return True

    def wake(self) -> None:
        pass


class Runs:
    """The runs that are under way on this rank.

    Attributes:
        under_way: the runs, outermost first.
        num_run_boundaries: the number of shared runs that were started, plus the number that ended: it shows how far
            a rank is.
        thread_id: the thread whose loop runs.
    """

    def __init__(self) -> None:
        self.under_way: list[Run] = []
        self.num_run_boundaries = 0
        self.thread_id = threading.get_ident()
        self._where: Where = lambda frames: []  # from the last engine that started a run
        self._lock = threading.Lock()

    def begin(self, run: Run, where: Where) -> None:
        with self._lock:
            self.under_way = [*self.under_way, run]
            self.num_run_boundaries += run.number is not None
            self.thread_id = threading.get_ident()
            self._where = where

    def end(self, run: Run) -> None:
        with self._lock:
            self.under_way = [each for each in self.under_way if each is not run]
            self.num_run_boundaries += run.number is not None

    def shared(self) -> list[Run]:
        """The runs that all ranks share."""
        return [run for run in self.under_way if run.number is not None]

    def where(self, frames: Iterable[FrameType]) -> tuple[Level, ...]:
        """The positions of the engines that run in these frames, outermost first."""
        return tuple(self._where(frames)) if self.under_way else ()

    def interrupt(self) -> None:
        """Make every loop check whether it may go on."""
        for run in self.under_way:
            run.interrupt()

    def wake(self) -> None:
        """Wake up every loop that waits for a decision."""
        for run in self.under_way:
            run.wake()
