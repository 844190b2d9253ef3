"""How ranks agree when to leave a run, without waiting for each other while nobody wants to.

Every rank's thread reads one list of messages, in one order (channel.py). If a rank asks to stop, each rank's thread
reports how far its loop has *started*. The furthest position is where all stop, and every rank can reach it: whoever is
before it goes on, whoever is there waits for the decision. No loop ever waits for a rank that waits for it in a
collective, since the threads answer, not the loops.

    loop                                          thread
    writes that it starts a step, then looks      raises the flag, then reads how far
    whether the flag is up                        the loop has started

Whichever comes first, either the loop sees the flag, or the thread sees the step.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any, Literal, Protocol, TypeAlias

from torch.distributed import DistError

from dengine.control.ddp_errors import explain
from dengine.control.failure import Failure, Level
from dengine.launch.world import entered_plane

__all__ = ["END", "Run", "Runs", "Scope", "begin_run", "position"]

Scope: TypeAlias = Literal["run", "epoch"]
_Key: TypeAlias = tuple[Scope, int]  # a scope, and the epoch that is to be left (0 for a run)

_EPOCH_BITS = 40
END = (1 << _EPOCH_BITS) - 1  # as an iteration: the end of the epoch, with its metrics and EPOCH_COMPLETED
_NUM_KEPT_RUNS = 256  # that have ended; no rank lags by more
_EMPTY_PAUSE_S = 0.002
_POLL_S = 0.1  # how often a waiting loop looks whether the others can still be reached


class _Status(Protocol):
    failure: Failure | None
    is_store_lost: bool


class _Failures(Protocol):
    def check(self) -> None: ...
    def failed(self, error: BaseException, run: int | None, here: FrameType) -> BaseException: ...
    def without_store(self, consequence: str, error: Exception | None = None) -> BaseException: ...


class _Messages(Protocol):
    def publish(self, **message: Any) -> None: ...


class _Control(Protocol):
    """What a run needs from plane.py, which imports this file."""

    context: Any
    status: _Status
    failures: _Failures
    messages: _Messages
    runs: Runs


def position(epoch: int, iteration: int) -> int:
    """A position in a run, as one number that grows: `iteration` of `epoch`, from 1; 0 is before the first."""
    return (epoch << _EPOCH_BITS) + iteration


def begin_run(*, is_shared: bool, where: Callable[[Iterable[FrameType]], list[Level]]) -> Run:
    """Begin the next run of an engine: one that all ranks run or (not `is_shared`) this rank's own. No communication.

    Outside `process_group()`, and with a group whose store cannot be reached, the run is this rank's own.

    Args:
        where: gives the positions of the engines that run in some frames, for reports.

    Raises:
        RemoteRankError, StallError: a rank has failed before.
    """
    plane: Any = entered_plane()
    return plane.runs.begin(is_shared=is_shared, where=where) if hasattr(plane, "runs") else Run()


class Run:
    """One run of an engine, as the ranks agree about it. In a world of one every request is granted at once.

    `started` is the furthest position that the loop may have started. The loop writes it, in every iteration, before it
    looks whether it may go on. `number` counts the runs that all ranks share; None for this rank's own.
    """

    def __init__(self, number: int | None = None, control: _Control | None = None) -> None:
        self.started = -1
        self.number = number
        self.reason = ""  # why the run is left, given by the rank that asked first
        self.interrupt: Callable[[], None] = _nothing  # has the loop look whether it may go on
        self.where: Callable[[Iterable[FrameType]], list[Level]] = lambda frames: []
        self.on_end: Callable[[Run], None] = lambda run: None
        self._control = control
        self.received: set[_Key] = set()  # by the thread
        self._requested: set[_Key] = set()
        self._decided: dict[_Key, int] = {}
        self._changed = threading.Condition()
        self._last_with_batches = -1  # epoch in which this rank had one, of those that it has left
        self._inquired_about: set[int] = set()  # epochs in which another rank had none, and wants to know who had

    def request_stop(self, scope: Scope, epoch: int, reason: str = "") -> None:
        """Ask all ranks to leave the run or the epoch. The loop learns of it by `interrupt`.

        Raises: LaunchError: the store is gone, by which they would learn of it.
        """
        key = (scope, epoch if scope == "epoch" else 0)
        if self._control is None:
            self.set_target(key, self.started, reason)
        elif self._mark_requested(key):
            try:
                # All ranks may ask at once: only the first request is published.
                if self._control.context.store.add(f"asked/{self.number}/{scope}/{key[1]}", 1) == 1:
                    message = {"run": self.number, "scope": scope, "epoch": key[1], "reason": reason}
                    self._control.messages.publish(kind="stop", **message)
            except DistError as error:
                raise self._control.failures.without_store("they cannot agree where to stop", error) from None
        self.interrupt()

    def stop_targets(self, epoch: int) -> tuple[int, int | None]:
        """The furthest positions that may be started: in the run, and in `epoch` if that is to be left (else None).

        Waits while a stop request is being decided.

        Raises:
            RemoteRankError, StallError: a rank has failed. LaunchError: the other ranks cannot be reached.
        """
        while True:
            if self._control is not None:
                self._control.failures.check()
            with self._changed:
                if not self._requested:
                    return self._decided.get(("run", 0), sys.maxsize), self._decided.get(("epoch", epoch))
                if self._control is not None and self._control.status.is_store_lost:
                    raise self._control.failures.without_store("they cannot agree where to stop")
                self._changed.wait(_POLL_S)

    def failed(self, error: BaseException) -> BaseException:
        """Report `error`, which leaves the run, to the other ranks; gives what to raise for it."""
        explain(error)
        if self._control is None:
            return error
        return self._control.failures.failed(error, self.number, sys._getframe(1))

    def end(self) -> None:
        """Note that the loop is over: this run interrupts nobody any more, and keeps nobody waiting."""
        self.interrupt = _nothing
        self.note_batches(END)  # nobody is to wait for this rank
        self.on_end(self)

    def note_batches(self, epoch: int) -> None:
        """Note that this rank had a batch in `epoch`, which it leaves. Cost: a request to the store, if one asked."""
        self._last_with_batches = epoch
        if self._inquired_about and self._control is not None:
            with suppress(DistError):  # the store is gone, and who asked notices
                self._report_batches(self._control.context.store)

    def receive_empty(self, epoch: int, store: Any) -> None:
        """Take in that another rank had no batch in `epoch`: report now if this one had, else once the loop knows."""
        self._inquired_about.add(epoch)
        self._report_batches(store)

    def has_any_rank_batches(self, epoch: int) -> bool:
        """Whether any rank has a batch in `epoch`, in which this one has none. Waits until that is known.

        True if it cannot be known, as the run is being left. A rank with batches pays nothing while nobody asks.
        Raises: RemoteRankError, StallError: a rank has failed. LaunchError: the store is gone.
        """
        if self._control is None or self.number is None:
            return True
        store, size = self._control.context.store, self._control.context.here.size
        count, answer = f"empty/{self.number}/{epoch}", f"batches/{self.number}/{epoch}"
        pause_s, asked_s, wait_s = _EMPTY_PAUSE_S, time.monotonic(), 0.0
        try:
            store.add(count, 1)
            while not self.must_check and not store.check([answer]) and store.add(count, 0) < size:
                if time.monotonic() - asked_s >= wait_s:
                    self._control.messages.publish(kind="empty", run=self.number, epoch=epoch)
                    asked_s, wait_s = time.monotonic(), 2 * wait_s + 1.0
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_S)
            # Asked last: another rank that has seen it has left the run by now, and may have reported so.
            return bool(store.add(count, 0) < size)
        except DistError as error:
            raise self._control.failures.without_store("they cannot tell whether any has a batch", error) from None

    def _report_batches(self, store: Any) -> None:
        for epoch in list(self._inquired_about):
            if self._last_with_batches >= epoch or position(epoch, 2) <= self.started < position(epoch, END):
                self._inquired_about.discard(epoch)
                store.set(f"batches/{self.number}/{epoch}", "yes")

    @property
    def depth(self) -> int:
        """How many runs that all ranks share are under way on this rank, this one included; 1 if nobody counts them."""
        return 1 if self._control is None else len(self._control.runs.shared())

    @property
    def must_check(self) -> bool:
        """Whether the loop has to look: a stop was requested or decided, or a rank has failed."""
        return bool(self._requested or self._decided) or (
            self._control is not None and self._control.status.failure is not None
        )

    def receive_stop(self, key: _Key, number: int, store: Any) -> bool:
        """Take in message `number`, a stop request: report how far the loop has started. False if it is known."""
        if key in self.received:
            return False
        self.received.add(key)
        self._mark_requested(key)
        self.interrupt()
        store.append(f"begun/{number}", f"{self.started} ")
        store.add(f"begun/{number}/count", 1)
        return True

    def set_target(self, key: _Key, target: int, reason: str = "") -> None:
        with self._changed:
            self._requested.discard(key)
            self._decided.setdefault(key, target)
            self.reason = self.reason or reason
            self._changed.notify_all()

    def wake(self) -> None:
        """Wake up a loop that waits for a decision."""
        with self._changed:
            self._changed.notify_all()

    def _mark_requested(self, key: _Key) -> bool:
        """Have the loop wait for the decision about `key`; False if it was requested or decided before."""
        with self._changed:
            if key in self._decided or key in self._requested:
                return False
            self._requested.add(key)
            return True


class Runs:
    """The runs of this rank.

    Attributes:
        under_way: outermost first.
        num_turns: how many runs were begun plus how many were ended: the rank with fewer has got less far.
        thread_id: of the thread whose loop runs.
    """

    def __init__(self, control: _Control) -> None:
        self.under_way: list[Run] = []
        self.num_turns = 0
        self.thread_id = threading.get_ident()
        self._control = control
        self._by_number: dict[int, Run] = {}  # that all ranks share
        self._num_shared = 0
        self._lock = threading.Lock()

    def begin(self, *, is_shared: bool, where: Callable[[Iterable[FrameType]], list[Level]]) -> Run:
        """The next run of this rank. Ranks begin those that they share in the same order.

        Raises:
            RemoteRankError, StallError: a rank has failed before.
        """
        self._control.failures.check()
        if is_shared and self.shared() and threading.get_ident() != self.thread_id:
            raise RuntimeError(
                "A run that all ranks share is under way in another thread, and the ranks cannot tell the two apart. "
                "Run them one after the other, or make one Engine(..., distributed=False)."
            )
        with self._lock:
            run = self._next_shared() if is_shared else Run()
            run.where = where
            run.on_end = self._remove
            self.under_way = [*self.under_way, run]
            self.num_turns += is_shared
            self.thread_id = threading.get_ident()
        self._control.context.connections.wake()
        return run

    def shared(self) -> list[Run]:
        """The runs under way that all ranks share."""
        return [run for run in self.under_way if run.number is not None]

    def numbered(self, number: int) -> Run:
        """The shared run of this number. Another rank may name one that this rank has yet to begin."""
        with self._lock:
            return self._by_number.setdefault(number, Run(number, self._control))

    def where(self, frames: Iterable[FrameType]) -> tuple[Level, ...]:
        """The positions of the engines that run in these frames, outermost first."""
        under_way = self.under_way
        return tuple(under_way[0].where(frames)) if under_way else ()

    def wake(self) -> None:
        """Wake up every loop that waits for a decision."""
        for run in list(self._by_number.values()):
            run.wake()

    def _next_shared(self) -> Run:
        run = self._by_number.setdefault(self._num_shared, Run(self._num_shared, self._control))
        # A run that has ended here still reports how far it got, to ranks that are in it.
        ended = self._by_number.pop(self._num_shared - _NUM_KEPT_RUNS, None)
        if ended is not None and ended.received and self._control.context.here.rank == 0:
            for scope, epoch in ended.received:
                self._control.context.store.delete_key(f"asked/{ended.number}/{scope}/{epoch}")
        self._num_shared += 1
        return run

    def _remove(self, run: Run) -> None:
        with self._lock:
            self.under_way = [each for each in self.under_way if each is not run]
            if run.number is not None:
                self.num_turns += 1


def _nothing() -> None:
    pass
