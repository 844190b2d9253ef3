"""The control plane: this rank's end of what lets all ranks leave together.

A thread sleeps until there is a message (channel.py); no loop waits for a rank, and no rank asks another one for
anything while all goes well. What becomes of a failure is in propagation.py, how a run stops at one iteration on all
ranks in stop.py, and what a rank does by itself now and then (publish its position, look whether somebody is gone or
hangs) in watchdog.py.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

from torch.distributed import DistError, ProcessGroup

from dengine.control.call_log import CallLog, call_site
from dengine.control.channel import POLL_S, ControlContext, Messages
from dengine.control.deadlock import END_OF_GROUP
from dengine.control.failure import Failure
from dengine.control.prepared import Prepared
from dengine.control.propagation import Failures
from dengine.control.status import GroupStatus
from dengine.control.stop import Runs, Scope
from dengine.launch.parsing import has_fields, parse_numbers, warn_malformed
from dengine.launch.world import entered_plane

__all__ = ["Control", "NullPlane", "Plane", "exempt_key", "plane"]

_LEAVE_S = 2.0
_LATE_S = 0.3


class Plane(Protocol):
    """What this package asks of the control plane: `Control`, or `NullPlane` if there are no ranks to talk to."""

    @property
    def group(self) -> ProcessGroup | None:
        """The process group of this package's own collectives, for tensors on the CPU. None: the default group."""

    @property
    def prepared(self) -> Prepared: ...

    def enter_call(self, what: str, site: str) -> None:
        """Note that this rank calls the collective `what`; a `site` that is not empty must be the same on all ranks.

        Raises: ConsistencyError: another rank has called something else. RemoteRankError, StallError: one has failed.
        """

    def leave_call(self) -> None: ...

    def call_site(self) -> str:
        """The line of the user's code that calls, if the ranks compare it; else ""."""

    def tick(self) -> None:
        """Note that this rank is at work."""

    def exempt(self) -> AbstractContextManager[None]:
        """Inside the `with` block this rank may take as long as it likes, and does not count as hanging."""


class NullPlane:
    """In a world of one, and in a group of somebody else whose ranks reach no store together: nobody is told anything.

    It keeps nothing, so that one is as good as another.
    """

    group = None

    @property
    def prepared(self) -> Prepared:
        return Prepared()  # nobody to compare with

    def enter_call(self, what: str, site: str) -> None:
        pass

    def leave_call(self) -> None:
        pass

    def call_site(self) -> str:
        return ""

    def tick(self) -> None:
        pass

    def exempt(self) -> AbstractContextManager[None]:
        return nullcontext()


_OUTSIDE = NullPlane()


def plane() -> Plane:
    """The control plane of the world that is open. Never communicates."""
    return entered_plane() or _OUTSIDE


class Control:
    """This rank's end of the control plane. Cost: a thread that sleeps, two connections to the store.

    Attributes:
        num_ticks: calls of `distributed.progress()`.
        num_exempt: how many parts of the script this rank is in that may take as long as they like.
        answer: answers a liveness probe; set by liveness.py.
    """

    def __init__(self, context: ControlContext) -> None:
        self.context = context
        self.runs = Runs(self)
        self.status = GroupStatus(self.runs.wake)
        self.call_log = CallLog(context.here, context.store)
        self.messages = Messages(context)
        self.failures = Failures(context, self.messages, self.call_log, self.status, self.runs)
        self.num_ticks = 0
        self.num_exempt = 0
        self.answer: Callable[[int], None] = lambda number: None
        self.prepared = Prepared()
        self.group: ProcessGroup | None = context.group
        self._stop_requests: dict[int, dict[str, Any]] = {}  # rank 0: those that not all ranks have answered
        self._thread = threading.Thread(target=self._read_all, name="dengine-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- collectives, and time for them ---------------------------------------------------------------------------

    def enter_call(self, what: str, site: str) -> None:
        self.failures.check()
        self.call_log.enter(what, site)

    def leave_call(self) -> None:
        self.call_log.leave()

    def call_site(self) -> str:
        return call_site()

    def tick(self) -> None:
        self.num_ticks += 1

    @contextmanager
    def exempt(self) -> Iterator[None]:
        store, key = self.context.store, exempt_key(self.context.here.rank)
        with suppress(DistError):  # the store is gone, and nobody can ask
            store.set(key, "yes")  # for those who ask while this rank holds the interpreter
        self.num_exempt += 1
        try:
            yield
        finally:
            self.num_ticks += 1
            self.num_exempt -= 1
            if not self.num_exempt:
                with suppress(DistError):
                    store.delete_key(key)

    # -- reading -------------------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        try:
            while not self.status.has_ended:
                number = self.messages.number
                message = self.messages.next(may_sleep=not self._stop_requests)
                if message is not None:
                    self._receive(number, message)
                self._decide_stops()
            self.messages.reader.add("gone", 1)
        except Exception as error:  # the store is gone, with the process that hosted it
            self.failures.lose_store(error)

    def _receive(self, number: int, message: dict[str, Any]) -> None:
        try:
            self._handle(number, message)
        except DistError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            warn_malformed(message)

    def _handle(self, number: int, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "failed":
                failure = Failure.from_dict(message["failure"])
                if not 0 <= failure.rank < self.context.here.size:
                    raise ValueError(f"rank={failure.rank}")
                self.failures.receive(failure)
            case "empty" if has_fields(message, run=int, epoch=int):
                self.runs.numbered(message["run"]).receive_empty(message["epoch"], self.messages.reader)
            case "call" if has_fields(message, number=int):
                self.answer(message["number"])
            case "left":
                self.status.update(all_left=True, has_ended=True)
            case "end":
                if self.status.failure is not None:
                    self.failures.abort()
                self.status.update(has_ended=True)
            case "decided" if has_fields(message, run=int, target=int, reason=str):
                self.runs.numbered(message["run"]).set_target(_key(message), message["target"], message["reason"])
            case "stop" if has_fields(message, run=int, reason=str):
                run = self.runs.numbered(message["run"])
                is_new = run.receive_stop(_key(message), number, self.messages.reader)
                if is_new and self.context.here.rank == 0:
                    self._stop_requests[number] = message
            case _:
                warn_malformed(message)

    def _decide_stops(self) -> None:
        """On rank 0: once every rank has reported how far it is, publish the furthest position as the target."""
        reader = self.messages.reader
        for number, message in list(self._stop_requests.items()):
            if reader.add(f"begun/{number}/count", 0) == self.context.here.size:
                target = max(parse_numbers(reader.get(f"begun/{number}")))
                self.messages.publish(**{**message, "kind": "decided", "target": target})
                del self._stop_requests[number]
                for key in (f"begun/{number}", f"begun/{number}/count"):
                    reader.delete_key(key)

    # -- leaving -------------------------------------------------------------------------------------------------

    def leave_together(self) -> None:
        """Wait until all ranks are here. Uses the store and not the group: a rank that left its loop early would join a
        collective that the others are still in.

        Collective. Raises: RemoteRankError, StallError: a rank fails meanwhile. LaunchError: the store is gone.
        """
        store = self.context.store
        try:
            if store.add("left", 1) == self.context.here.size:
                store.set("all_left", "yes")  # before any rank reads the message, and closes
                self.messages.publish(kind="left")
        except DistError as error:
            raise self.failures.without_store("they cannot leave together", error) from None
        self.call_log.wait(END_OF_GROUP)
        try:
            self._wait_until_all_left()
        finally:
            self.call_log.leave()

    def _wait_until_all_left(self) -> None:
        status = self.status
        while not status.all_left:
            self.failures.check()
            if status.is_store_lost:
                raise self.failures.without_store("they cannot leave together")
            if status.has_ended and not status.all_left:
                raise RuntimeError("The ranks could not leave together: another one has left by an error.")
            status.wait_for(lambda: status.all_left or status.failure is not None or status.has_ended, 1.0)
            if not status.all_left and not status.is_store_lost:
                self._check_all_left()

    def _check_all_left(self) -> None:
        """Look into the store: the last rank to come may have been killed just before it published that all have."""
        store, mine = self.context.store, str(self.context.here.rank)
        try:
            if self.has_all_left():
                if store.compare_set("who_says_left", "", mine).decode() == mine:
                    self.messages.publish(kind="left")
                self.status.update(all_left=True)
        except DistError as error:
            raise self.failures.without_store("they cannot leave together", error) from None

    def has_all_left(self) -> bool:
        return self.status.all_left or self.context.store.check(["all_left"])

    def close(self, *, is_failing: bool) -> None:
        """End the threads; if this rank fails, free those who wait for it. Cost: 2.3 s at most, on rank 0 4.3 s."""
        self.status.is_closed = True
        self.context.connections.wake()
        with suppress(DistError):  # the store is gone
            if is_failing:
                if not self.status.is_aborted:  # else all others abort by themselves
                    self.context.connections.hang_up()
                elif self.status.is_store_lost:  # at once, and they may be late
                    time.sleep(_LATE_S)
                if not self.status.is_store_lost and self.context.store.add("ended", 1) == 1:
                    self.messages.publish(kind="end")
            self._thread.join(timeout=_LEAVE_S)  # a thread that is killed with the interpreter can crash the process
            if self.context.endpoint.is_hosted_by_rank_zero and self.context.here.rank == 0:
                self._wait_for_the_others()

    def _wait_for_the_others(self) -> None:
        """Give the others time to read all messages: this process takes the store with it."""
        end = time.monotonic() + _LEAVE_S
        failure = self.status.failure
        is_one_lost = failure is not None and (failure.kind == "vanished" or failure.is_frozen)
        while self.context.store.add("gone", 0) < self.context.here.size - is_one_lost and time.monotonic() < end:
            time.sleep(POLL_S)


def _key(message: dict[str, Any]) -> tuple[Scope, int]:
    if message["scope"] not in ("run", "epoch") or not has_fields(message, epoch=int):
        raise ValueError("no scope, or no epoch")
    return message["scope"], message["epoch"]


def exempt_key(rank: int) -> str:
    """The key that exists while `rank` is in a part of the script that may take as long as it likes."""
    return f"exempt/{rank}"
