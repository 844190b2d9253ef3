"""Let ranks agree when to leave a run, without any wait unless a rank wants to stop.

Every rank's thread reads one list of messages, in one order (channel.py). If a rank asks to stop, each rank's thread
reports how far its loop has *started*. All stop at the furthest position, which every rank can reach: ranks before it
go on, ranks at it wait for the decision. No loop waits for a rank that waits for it in a collective, since the threads
answer, not the loops.

    loop                                          thread
    writes that it starts a step, then looks      raises the flag, then reads how far
    whether the flag is up                        the loop has started

Whichever comes first, either the loop sees the flag, or the thread sees the step.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any

from torch.distributed import DistError, Store

from dengine.control.context import ControlContext
from dengine.control.ddp_errors import explain
from dengine.control.propagation import Failures
from dengine.control.run import END, Key, Run, Scope, position
from dengine.launch.parsing import has_fields, parse_numbers

__all__ = ["SharedRun", "SharedRuns"]

_NUM_KEPT_RUNS = 256  # runs that have ended; no rank is later by more
_EMPTY_PAUSE_S = 0.002
_POLL_S = 0.1  # between two checks of a waiting loop that the others can still be reached


class SharedRun(Run):
    """A run that all ranks share. It is made when this rank starts it, or when another rank mentions it."""

    def __init__(self, number: int, context: ControlContext, failures: Failures) -> None:
        super().__init__(context.runs, number)
        self.received: set[Key] = set()  # by the thread
        self._context = context
        self._failures = failures
        self._requested: set[Key] = set()
        self._changed = threading.Condition()
        self._last_with_batches = -1  # the last epoch that this rank has left in which it had a batch
        self._inquired_about: set[int] = set()  # epochs in which another rank had none, and asks whether any had

    @property
    def depth(self) -> int:
        return len(self._runs.shared())

    @property
    def must_check(self) -> bool:
        return bool(self._requested or self._targets) or self._context.status.failure is not None

    def request_stop(self, scope: Scope, epoch: int, reason: str = "") -> None:
        key = (scope, epoch if scope == "epoch" else 0)
        if self._mark_requested(key):
            try:
                # All ranks may ask at once: only the first request is published.
                if self._context.store.add(_asked_key(self.number, key), 1) == 1:
                    message = {"run": self.number, "scope": scope, "epoch": key[1], "reason": reason}
                    self._context.messages.publish(kind="stop", **message)
            except DistError as error:
                raise self._failures.without_store("they cannot agree where to stop", error) from None
        self.interrupt()

    def stop_targets(self, epoch: int) -> tuple[int, int | None]:
        failures = self._failures
        while True:
            failures.check()
            with self._changed:
                if not self._requested:
                    return self._targets.get(("run", 0), sys.maxsize), self._targets.get(("epoch", epoch))
                if self._context.status.is_store_lost:
                    raise failures.without_store("they cannot agree where to stop")
                self._changed.wait(_POLL_S)

    def failed(self, error: BaseException) -> BaseException:
        explain(error)
        return self._failures.failed(error, self.number, sys._getframe(1))

    def note_batches(self, epoch: int) -> None:
        self._last_with_batches = epoch
        if self._inquired_about:
            with suppress(DistError):  # the store is gone, which the rank that asked notices
                self._report_batches(self._context.store)

    def receive_empty(self, epoch: int, store: Store) -> None:
        """Receive that another rank had no batch in `epoch`: report now if this one had, else once the loop knows."""
        self._inquired_about.add(epoch)
        self._report_batches(store)

    def has_any_rank_batches(self, epoch: int) -> bool:
        store, size = self._context.store, self._context.here.size
        count, answer = f"empty/{self.number}/{epoch}", f"batches/{self.number}/{epoch}"
        pause_s, asked_s, wait_s = _EMPTY_PAUSE_S, time.monotonic(), 0.0
        try:
            store.add(count, 1)
            while not self.must_check and not store.check([answer]) and store.add(count, 0) < size:
                if time.monotonic() - asked_s >= wait_s:
                    self._context.messages.publish(kind="empty", run=self.number, epoch=epoch)
                    asked_s, wait_s = time.monotonic(), 2 * wait_s + 1.0
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_S)
            # Checked last: another rank that has seen it may have left the run by now, and reported that.
            return bool(store.add(count, 0) < size)
        except DistError as error:
            raise self._failures.without_store("they cannot tell whether any has a batch", error) from None

    def _report_batches(self, store: Store) -> None:
        for epoch in list(self._inquired_about):
            if self._last_with_batches >= epoch or position(epoch, 2) <= self.started < position(epoch, END):
                self._inquired_about.discard(epoch)
                store.set(f"batches/{self.number}/{epoch}", "yes")

    def receive_stop(self, key: Key, number: int, store: Store) -> bool:
        """Receive message `number`, a stop request: report how far the loop has started. False if it is known."""
        if key in self.received:
            return False
        self.received.add(key)
        self._mark_requested(key)
        self.interrupt()
        store.append(f"started/{number}", f"{self.started} ")  # type: ignore[attr-defined]  # not in torch's stubs
        store.add(f"started/{number}/count", 1)
        return True

    def receive_target(self, key: Key, target: int, reason: str) -> None:
        """Receive the position at which all ranks leave `key`."""
        with self._changed:
            self.set_target(key, target, reason)
            self._requested.discard(key)
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _mark_requested(self, key: Key) -> bool:
        """Make the loop wait for the decision about `key`; False if it was requested or decided before."""
        with self._changed:
            if key in self._targets or key in self._requested:
                return False
            self._requested.add(key)
            return True


class SharedRuns:
    """The runs that all ranks share, by number, and the messages about them."""

    def __init__(self, context: ControlContext, failures: Failures) -> None:
        self._context = context
        self._failures = failures
        self._by_number: dict[int, SharedRun] = {}
        self._num_started = 0
        self._stop_requests: dict[int, dict[str, Any]] = {}  # on rank 0: requests that not all ranks have answered
        self._lock = threading.Lock()

    def next(self) -> SharedRun:
        """The run that this rank starts. All ranks start their shared runs in the same order."""
        if self._context.runs.shared() and threading.get_ident() != self._context.runs.thread_id:
            raise RuntimeError(
                "A run that all ranks share is under way in another thread, and the ranks cannot tell the two apart. "
                "Run them one after the other, or make one Engine(..., distributed=False)."
            )
        with self._lock:
            number = self._num_started
            run = self._by_number.setdefault(number, SharedRun(number, self._context, self._failures))
            # A run that has ended here still reports its position to ranks that are in it.
            ended = self._by_number.pop(number - _NUM_KEPT_RUNS, None)
            if ended is not None and self._context.here.rank == 0:
                for key in ended.received:
                    self._context.store.delete_key(_asked_key(ended.number, key))
            self._num_started += 1
            return run

    def _numbered(self, number: int) -> SharedRun:
        """The run with this number. Another rank may mention one that this rank has not started yet."""
        with self._lock:
            return self._by_number.setdefault(number, SharedRun(number, self._context, self._failures))

    # -- for the thread that reads messages ------------------------------------------------------------------------

    @property
    def is_deciding(self) -> bool:
        """Whether this rank is rank 0, and waits for the others' reports about a stop."""
        return bool(self._stop_requests)

    def receive(self, number: int, message: dict[str, Any]) -> bool:
        """Receive message `number`, if it is about a run. False if it is not, or is malformed."""
        if not has_fields(message, run=int, epoch=int):
            return False
        run, reader = self._numbered(message["run"]), self._context.messages.reader
        match message["kind"]:
            case "empty":
                run.receive_empty(message["epoch"], reader)
            case "decided" if has_fields(message, target=int, reason=str):
                run.receive_target(_key(message), message["target"], message["reason"])
            case "stop" if has_fields(message, reason=str):
                if run.receive_stop(_key(message), number, reader) and self._context.here.rank == 0:
                    self._stop_requests[number] = message
            case _:
                return False
        return True

    def decide_stops(self) -> None:
        """On rank 0, publish the furthest position as the target, once every rank has reported its own."""
        reader = self._context.messages.reader
        for number, message in list(self._stop_requests.items()):
            if reader.add(f"started/{number}/count", 0) == self._context.here.size:
                target = max(parse_numbers(reader.get(f"started/{number}")))
                self._context.messages.publish(**{**message, "kind": "decided", "target": target})
                del self._stop_requests[number]
                for key in (f"started/{number}", f"started/{number}/count"):
                    reader.delete_key(key)


def _key(message: dict[str, Any]) -> Key:
    if message["scope"] not in ("run", "epoch"):
        raise ValueError("no scope")
    return message["scope"], message["epoch"]


def _asked_key(number: int | None, key: Key) -> str:
    return f"asked/{number}/{key[0]}/{key[1]}"
