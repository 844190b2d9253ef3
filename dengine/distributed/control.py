"""How ranks leave together: one list of messages on the store, which a thread of each rank reads in one order.

The thread sleeps until there is a message; no loop waits for a rank, and no rank asks another one for anything while
all goes well. What a rank does by itself now and then (tell where it is, look whether somebody is gone or hangs) is in
watch.py; how a run stops at one iteration on all ranks is in runs.py.

A failure goes so. The rank that raises tells the others first (`failed`), then raises. Each rank hears of it, and its
loops stop before their next iteration. Whoever is in a collective waits for the failed rank in C++: the connections are
shut under it (`_break`), unless within a moment all ranks have left the run by an exception: one that all of them raise
alike, and may handle, ends nothing but the run.
"""

import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dengine.distributed.connections import Connections
from dengine.distributed.failure import (
    Failure,
    Level,
    frames_of,
    is_of_backend,
    line_of,
    remove_error_file,
    traceback_of,
    where_text,
    write_error_file,
)
from dengine.distributed.ledger import Ledger, num_joined
from dengine.distributed.runs import Run, Scope
from dengine.distributed.world import World
from dengine.errors import RemoteRankError, StallError

__all__ = ["Control", "Meeting", "Where", "abort_group", "say"]

Where: TypeAlias = Callable[[Iterable[FrameType]], list[Level]]

_FOR_EVER = timedelta(days=365)
_COLLECT_S = 0.002  # how often rank 0 looks whether all answers to a wish are there
_SETTLE_S = 2.0  # how long the other ranks may take to leave the run by an exception of their own
_HEAR_S = 0.5  # how long a failure takes, at most, from the one who tells it to those who hear it
_INQUIRE_S = 4.0  # how long it takes, at most, to find out who is gone
_TOLD_PER_RUN = 8  # all ranks may fail at once: the first ones name the cause
_LEAVE_S = 2.0
_KEPT_RUNS = 256
_MARK = "_dengine_told"  # on an exception that the others know of: the run that it left
_OUTSIDE = -1  # of any run


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet: the store's address, the part of it that is theirs, and whether rank 0 hosts it."""

    host: str
    port: int
    prefix: str
    is_hosted_by_rank_zero: bool

    def connect(self, timeout_s: float = 60.0) -> Any:
        """A connection of its own: a thread that waits on one keeps everybody else off it."""
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore(self.prefix, store)


class Control:
    """This rank's end of the control plane. Cost: a thread that sleeps, two connections to the store.

    Attributes:
        failure: the first failure that any rank told of, until it is forgiven; all ranks name the same one.
        is_lost: the store cannot be reached any more.
        group: the process group of this package's own collectives, for tensors on the CPU. In a common one a rank
            that is a collective ahead would join in one of DDP's, and both would get wrong numbers.
        runs: the runs under way on this rank, outermost first.
        num_turns: runs begun and ended so far: who has the fewer of them is behind.
    """

    def __init__(self, meeting: Meeting, here: World, connections: Connections, group: Any) -> None:
        self.here = here
        self.meeting = meeting
        self.connections = connections
        self.group = group
        self.store = meeting.connect()
        self.failure: Failure | None = None
        self.is_lost = False
        self.runs: list[Run] = []
        self._models: list[weakref.ref[nn.Module]] = []
        self.num_turns = 0
        self.num_ticks = 0  # of distributed.progress()
        self.thread_id = threading.get_ident()  # of the loop
        self.ledger = Ledger(here, self.store)
        self.answer: Callable[[dict[str, Any]], None] = lambda message: None  # to an inquiry: watch.py's
        self.inquire: Callable[[], None] = lambda: None
        self.is_closed = False
        self.last_seen_of_rank_zero: tuple[Level, ...] = ()  # kept by watch.py: the store could not tell afterwards
        self._reader = meeting.connect()
        self._shared_runs: dict[int, Run] = {}
        self._num_shared_runs = 0
        self._lock = threading.Lock()
        self._collected: dict[int, dict[str, Any]] = {}  # rank 0: wishes whose answers are not all there
        self._left_by_error: set[int] = set()  # runs of which it is not settled yet whether all ranks have
        self._forgiven: set[int] = set()
        self.is_broken = False
        self._heard_at_s = 0.0
        self._changed = threading.Condition()  # of failure, is_broken, _all_left, is_lost
        self._all_left = False
        self.is_over = False  # nobody says anything any more
        self.is_leaving = False  # this rank's run is on its way out, by an error
        self._num_inquiries = 0
        self._later: list[Failure] = []  # heard while another one was not settled yet
        self._thread = threading.Thread(target=self._read_all, name="dengine-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- runs ----------------------------------------------------------------------------------------------------

    def begin_run(self, *, is_shared: bool, where: Where) -> Run:
        """The next run of this rank. Ranks begin those that they share in the same order.

        Raises:
            RemoteRankError, StallError: a rank has failed before.
        """
        self.check()
        if is_shared and self.shared_runs() and threading.get_ident() != self.thread_id:
            raise RuntimeError(
                "A run that all ranks share is under way in another thread, and the ranks cannot tell the two apart. "
                "Run them one after the other, or make one Engine(..., distributed=False)."
            )
        with self._lock:
            if is_shared:
                run = self._shared_run(self._num_shared_runs)
                # One that has ended here goes on telling how far it got, to ranks that are still in it.
                self._shared_runs.pop(self._num_shared_runs - _KEPT_RUNS, None)
                self._num_shared_runs += 1
            else:
                run = Run()
            run.where = where
            run.on_end = self._ended
            self.runs = [*self.runs, run]
            self.num_turns += is_shared
            self.thread_id = threading.get_ident()
        self.connections.wake()
        return run

    def shared_runs(self) -> list[Run]:
        """The runs under way that all ranks share."""
        return [run for run in self.runs if run.number is not None]

    def _ended(self, run: Run) -> None:
        with self._lock:
            self.runs = [each for each in self.runs if each is not run]
            if run.number is not None:
                self.num_turns += 1

    def _shared_run(self, number: int) -> Run:
        """Known here or not yet: another rank may speak of a run that this one has still to begin."""
        return self._shared_runs.setdefault(number, Run(number, self))

    def add_model(self, model: nn.Module) -> None:
        """Have the parameters of `model` compared at the start of each run."""
        self._models.append(weakref.ref(model))

    def living_models(self) -> list[nn.Module]:
        return [model for each in self._models if (model := each()) is not None]

    def where(self, frames: Iterable[FrameType]) -> tuple[Level, ...]:
        """The engines that run in these frames, outermost first."""
        runs = self.runs
        return tuple(runs[0].where(frames)) if runs else ()

    # -- messages ------------------------------------------------------------------------------------------------

    def publish(self, **message: Any) -> None:
        """Append a message to the list that all ranks read."""
        number = self.store.add("messages", 1) - 1
        self.store.set(f"message/{number}", json.dumps(message))

    def _read_all(self) -> None:
        number = 0
        try:
            while not self.is_over:
                message = self._next(number)
                if message is not None:
                    self._handle(number, message)
                    number += 1
                self._collect()
            self._reader.add("gone", 1)
        except Exception as error:  # the store is gone, with the process that hosted it
            self.lose(error)

    def _next(self, number: int) -> dict[str, Any] | None:
        """The message of that number; waits for it, unless there are answers to be collected."""
        key = f"message/{number}"
        if not self._collected:
            self._reader.wait([key], _FOR_EVER)
        elif not self._reader.check([key]):
            time.sleep(_COLLECT_S)
            return None
        message: dict[str, Any] = json.loads(self._reader.get(key))
        return message

    def _handle(self, number: int, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "failed":
                self._hear(Failure.from_dict(message["failure"]))
            case "call":
                self.answer(message)
            case "left":
                self._note(all_left=True)
                self.is_over = True
            case "end":
                self.is_over = True
                if self.failure is not None:
                    self._break(self.failure)
                self._note()
            case "decided":
                self._run_of(message).decide(_key(message), message["target"], message["reason"])
            case "stop":
                is_new = self._run_of(message).hear(_key(message), number, self._reader, self.here.rank)
                if is_new and self.here.rank == 0:
                    self._collected[number] = message

    def _run_of(self, message: dict[str, Any]) -> Run:
        with self._lock:
            return self._shared_run(message["run"])

    def _collect(self) -> None:
        """On rank 0: where every rank has told how far it has begun, decide for the furthest."""
        for number, message in list(self._collected.items()):
            if self._reader.add(f"begun/{number}", 0) == self.here.size:
                keys = [f"begun/{number}/{rank}" for rank in range(self.here.size)]
                target = max(int(begun) for begun in self._reader.multi_get(keys))
                self.publish(**{**message, "kind": "decided", "target": target})
                del self._collected[number]

    # -- failure -------------------------------------------------------------------------------------------------

    def failed(self, error: BaseException, run: int | None, here: FrameType) -> BaseException:
        """What this rank is to raise where `error` leaves a run (or, `run` being None, the process group).

        The others are told of `error`, unless it is only what another rank's failure looks like from here: then it is
        that failure. Cost: two requests to the store; where a connection broke, up to 5 s to find out who is gone.
        """
        self.is_leaving = True
        raised = error
        told_of = getattr(error, _MARK, None)  # the run of which it was told; it may come from one within this one
        is_known = told_of is not None and told_of not in self._forgiven
        is_others = told_of is None and isinstance(error, RemoteRankError | StallError)
        if not is_known and not is_others:
            cause = self._cause_of(error) if is_of_backend(error) else None
            if cause is None:
                self._tell(error, run, here)
            else:
                raised = cause.as_error()
        failure = self.failure
        failed_run = failure.run if failure is not None else None if is_known else run
        with suppress(AttributeError):
            setattr(raised, _MARK, _OUTSIDE if failed_run is None else failed_run)
        if run is not None:
            if run == failed_run:
                self._left_by_error.add(run)
            self._note_out(run)
        return raised

    def _note_out(self, run: int) -> None:
        """Count this rank among those that left `run` by an exception, and note whether all left it at one place."""
        if self.is_broken or self.is_over:
            return
        joined = f"{num_joined(self.here.size)} {self.ledger.num_calls}"
        with suppress(RuntimeError):  # the store is gone
            if self.store.compare_set(f"out/{run}/joined", "", joined).decode() != joined:
                self.store.set(f"out/{run}/is_skewed", "yes")
            self.store.add(f"out/{run}", 1)
        self.connections.wake()

    def report(self, failure: Failure) -> None:
        """Tell all ranks of a failure."""
        if self.store.add(f"failures/{failure.run}", 1) <= _TOLD_PER_RUN:
            self.publish(kind="failed", failure=failure.to_dict())

    def check(self) -> None:
        """Raise what another rank's failure is raised as here, if there is one.

        Where all ranks may yet turn out to have left a run alike (see `settle`), it waits for that.
        """
        if self._left_by_error:
            with self._changed:
                self._changed.wait_for(self._is_settled, _SETTLE_S + _HEAR_S)
        failure = self.failure
        if failure is not None and not self._has_all_left_alike() and not self._may_still_fail_alike(failure):
            raise failure.as_error()

    def _is_settled(self) -> bool:
        return not self._left_by_error or self.is_broken or self._all_left

    def _has_all_left_alike(self) -> bool:
        """All ranks came to the end of the block, before anybody looked whether they had left the run alike: so it
        was, as else one of them would have been freed by breaking the group.
        """
        return self._all_left and not self.is_broken

    def _may_still_fail_alike(self, failure: Failure) -> bool:
        """Whether this rank has still to come to where another one failed: it goes on, since it may fail there too, as
        ranks do that check the same thing one after the other. Who waits there is freed by `settle`.
        """
        if self.is_broken or failure.run is None or failure.rank == self.here.rank:
            return False
        return any(run.number == failure.run and run.begun <= failure.begun for run in self.runs)

    def settle(self) -> None:
        """Forgive a failure, where all ranks have left its run by an exception; break the group, where they have not.

        One rank decides, whichever comes first.
        """
        failure = self.failure
        if failure is None or self.is_broken:
            return
        is_out = failure.run is not None and self.store.add(f"out/{failure.run}", 0) == self.here.size
        if is_out and self.store.check([f"out/{failure.run}/is_skewed"]):
            is_out = False  # one has joined in a collective that another one has not: the next would not fit
        elif failure.run is not None and not is_out and time.monotonic() < self._heard_at_s + _SETTLE_S:
            return
        wanted = "forgiven" if is_out else "broken"
        if self.store.compare_set(f"settled/{failure.run}", "", wanted).decode() == "forgiven":
            self._forgive(failure)
        else:
            self._break(failure)

    def lose(self, error: Exception) -> None:
        """The store is gone: nobody can be told or asked any more."""
        if self.is_closed or self.is_over or self.is_lost:
            return
        host = f"{self.meeting.host}:{self.meeting.port}"
        if self.meeting.is_hosted_by_rank_zero and self.here.rank != 0:
            why = f"the store at {host}, which its process hosted, is gone ({error})"
            self._hear(Failure("vanished", 0, why, self.last_seen_of_rank_zero))
        else:
            say(f"dengine: rank {self.here.rank} lost the store at {host} ({error}): it runs on by itself.\n")
        self._note(is_lost=True)
        if self.failure is not None:
            self._break(self.failure)

    def lose_host(self, timeout_s: float) -> None:
        """Rank 0's process, which hosts the store, is there but does not answer: nobody can be asked who hangs."""
        text = f"Rank 0, which hosts the store, has not answered for {timeout_s:g} s: its process is stopped or hangs."
        self._hear(Failure("stalled", 0, text, self.last_seen_of_rank_zero, is_frozen=True))
        self._note(is_lost=True)
        assert self.failure is not None
        self._break(self.failure)

    def _tell(self, error: BaseException, run: int | None, here: FrameType) -> None:
        text = traceback_of(error)
        line = line_of(error)
        where = self.where(frames_of(error, here))
        write_error_file(f"{line} ({where_text(where)})", text, is_cause=True)
        with suppress(RuntimeError):  # the store is gone
            begun = next((each.begun for each in self.runs if each.number == run), -1)
            self.report(Failure("raised", self.here.rank, line, where, text, run, begun))

    def _cause_of(self, error: BaseException) -> Failure | None:
        """The failure behind a broken connection. None where all ranks are there: then it is this rank's own."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.failure is not None, _HEAR_S):
                number = self._num_inquiries
                self.inquire()
                is_over = self._changed.wait_for(lambda: self.failure or self._num_inquiries > number, _INQUIRE_S)
                if is_over:  # what was found out is on its way, through the store
                    self._changed.wait_for(lambda: self.failure is not None, _HEAR_S)
        failure = self.failure
        is_mine = failure is not None and failure.rank == self.here.rank and failure.kind == "raised"
        return None if is_mine else failure

    def end_inquiry(self) -> None:
        """Nobody is gone, or whoever is has been told of."""
        with self._changed:
            self._num_inquiries += 1
            self._changed.notify_all()

    def _hear(self, failure: Failure) -> None:
        if failure.run in self._forgiven:
            return
        if self.failure is not None:
            self._later.append(failure)
            return
        self._heard_at_s = time.monotonic()
        self._note(failure=failure)
        for run in self.runs:
            run.interrupt()
        self.connections.wake()

    def _forgive(self, failure: Failure) -> None:
        assert failure.run is not None
        self._forgiven.add(failure.run)
        self.ledger.begin_anew(failure.run)
        if failure.rank == self.here.rank:
            remove_error_file()
        with self._changed:
            self.failure = None
            self.is_leaving = False
            self._left_by_error.discard(failure.run)
            self._changed.notify_all()
        later, self._later = self._later, []
        for each in later:
            self._hear(each)

    def _break(self, failure: Failure) -> None:
        if failure.rank != self.here.rank:
            write_error_file(failure.message(), failure.traceback, is_cause=False)
        self._note(is_broken=True)
        self.connections.shut()
        if "nccl" in self.here.backend:
            abort_group()

    def _note(
        self,
        *,
        failure: Failure | None = None,
        is_broken: bool = False,
        all_left: bool = False,
        is_lost: bool = False,
    ) -> None:
        with self._changed:
            self.failure = self.failure or failure
            self.is_broken |= is_broken
            self._all_left |= all_left
            self.is_lost |= is_lost
            self._changed.notify_all()
        for run in list(self._shared_runs.values()):
            run.look()

    # -- leaving -------------------------------------------------------------------------------------------------

    def leave_together(self) -> None:
        """Wait until all ranks are here. Not over the group: a rank that left its loop early would join in a collective
        that the others are still in.

        Collective. Raises: RemoteRankError, StallError where a rank fails meanwhile.
        """
        if self.store.add("left", 1) == self.here.size:
            self.store.set("all_left", "yes")  # before anybody hears of it, and closes
            self.publish(kind="left")
        while not self._all_left:
            self.check()
            if self.is_lost:
                raise RuntimeError("The ranks could not leave together: their store is gone.")
            if self.is_over and not self._all_left:
                raise RuntimeError("The ranks could not leave together: another one has left by an error.")
            with self._changed:
                self._changed.wait_for(lambda: self._all_left or self.failure is not None or self.is_over, 1.0)

    def has_all_left(self) -> bool:
        return self._all_left or self.store.check(["all_left"])

    def close(self, *, is_failing: bool) -> None:
        """End the threads; where this rank fails, free those who wait for it. Cost: 2 s at most."""
        self.is_closed = True
        self.connections.wake()
        with suppress(RuntimeError):  # the store is gone
            if is_failing:
                self.connections.shut()
                if not self.is_lost and self.store.add("ended", 1) == 1:
                    self.publish(kind="end")
            self._thread.join(timeout=_LEAVE_S)  # else it would be cut down at the process's end, and take it along
            if self.meeting.is_hosted_by_rank_zero and self.here.rank == 0:
                self._wait_for_the_others()

    def _wait_for_the_others(self) -> None:
        """This process takes the store with it: the others are to have heard all that there is to hear."""
        end = time.monotonic() + _LEAVE_S
        failure = self.failure
        is_one_lost = failure is not None and (failure.kind == "vanished" or failure.is_frozen)
        while self.store.add("gone", 0) < self.here.size - is_one_lost and time.monotonic() < end:
            time.sleep(_COLLECT_S)


def _key(message: dict[str, Any]) -> tuple[Scope, int]:
    return message["scope"], message["epoch"]


def abort_group() -> None:
    """End what is under way on the device, without waiting for it."""
    with suppress(Exception):  # nothing more can be done for a rank that waits on the device
        dist.distributed_c10d._abort_process_group()


def say(text: str) -> None:
    """One write, so that the lines of several ranks do not mix."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
