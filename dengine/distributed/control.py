"""How ranks agree when to leave a run, without waiting for each other while nobody wants to.

Every rank's thread reads one list of messages on the store, in one order. Where a rank asks to stop, each rank's thread
tells how far its loop has *begun*; the furthest is where all stop, and it is within reach of everybody: who is behind
goes on, who is there waits for the word. No loop ever waits for a rank that waits for it in a collective, since the
threads answer, not the loops.

    loop                                          thread
    tells that it begins a step, then looks       raises the flag, then reads how far
    whether the flag is up                        the loop has begun

Whichever comes first, either the loop sees the flag, or the thread sees the step.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal, TypeAlias

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dengine.distributed.world import World, control

__all__ = ["END", "Control", "Run", "Scope", "begin_run", "place"]

Scope: TypeAlias = Literal["run", "epoch"]
_Key: TypeAlias = tuple[str, int]  # a scope, and the epoch that is to be left (0 for a run)

_EPOCH_BITS = 40
END = (1 << _EPOCH_BITS) - 1  # as an iteration: the end of the epoch, with its metrics and EPOCH_COMPLETED

_COLLECT_S = 0.002  # how often rank 0 looks whether all answers to a wish are there
_LOOK_S = 0.1  # how often a waiting loop looks whether the store is still there
_FOR_EVER = timedelta(days=365)
_KEPT_RUNS = 256


def place(epoch: int, iteration: int) -> int:
    """A place in a run, as one number that grows: iteration `iteration` of `epoch`, from 1; 0 is before the first."""
    return (epoch << _EPOCH_BITS) + iteration


def begin_run() -> "Run":
    """The next run of an engine that all ranks run. Never communicates.

    Outside `process_group()`, and with a group whose store cannot be reached, the run is this rank's own.
    """
    plane = control()
    return plane.begin_run() if isinstance(plane, Control) else Run()


class Run:
    """One run of an engine, as the ranks agree about it. In a world of one every request is granted where it is made.

    `begun` is the furthest place that the loop may have begun. The loop writes it, in every iteration, before it asks
    whether it may go on.
    """

    def __init__(self, number: int = 0, control: "Control | None" = None) -> None:
        self.begun = -1
        self.interrupt: Callable[[], None] = _nothing  # has the loop look whether it may go on
        self._number = number
        self._control = control
        self.heard: set[_Key] = set()  # by the thread
        self._asked: set[_Key] = set()
        self._decided: dict[_Key, int] = {}
        self._changed = threading.Condition()

    def ask(self, scope: Scope, epoch: int) -> None:
        """Ask all ranks to leave the run or the epoch. The loop hears by `interrupt`."""
        key = (scope, epoch if scope == "epoch" else 0)
        if self._control is None:
            self.decide(key, self.begun)
        elif self.hold(key):
            self._control.publish(kind="stop", run=self._number, scope=scope, epoch=key[1])
        self.interrupt()

    def bounds(self, epoch: int) -> tuple[int, int | None]:
        """The furthest places that may be begun: of the run, and of `epoch` where it is to be left (else None).

        Waits while a wish to stop is being decided.

        Raises:
            RuntimeError: the other ranks cannot be reached.
        """
        with self._changed:
            while self._asked:
                if self._control is not None and self._control.is_lost:
                    raise RuntimeError("The ranks could not agree where to stop: their store is gone.")
                self._changed.wait(_LOOK_S)
            return self._decided.get(("run", 0), sys.maxsize), self._decided.get(("epoch", epoch))

    def end(self) -> None:
        """The loop is over: nobody is to be interrupted any more, nor kept alive."""
        self.interrupt = _nothing

    @property
    def is_asked(self) -> bool:
        """Whether a decision is due or there: whether the loop has to look."""
        return bool(self._asked or self._decided)

    def hold(self, key: _Key) -> bool:
        """Have the loop wait for the decision about `key`; False where it is there already."""
        with self._changed:
            if key in self._decided:
                return False
            self._asked.add(key)
            return True

    def decide(self, key: _Key, target: int) -> None:
        with self._changed:
            self._asked.discard(key)
            self._decided.setdefault(key, target)
            self._changed.notify_all()


class Control:
    """This rank's end of the control plane: a thread that reads, and two connections to the store.

    Cost: a thread that sleeps until there is a message, with no request to the store meanwhile; nothing in the loop.
    """

    def __init__(self, host: str, port: int, prefix: str, here: World) -> None:
        self._here = here
        self._reader, self._writer = (_connect(host, port, prefix) for _ in range(2))
        self._runs: dict[int, Run] = {}
        self._num_runs = 0
        self._lock = threading.Lock()
        self._collected: dict[int, dict[str, Any]] = {}  # rank 0: wishes whose answers are not all there
        self._is_closed = False
        self.is_lost = False
        self._thread = threading.Thread(target=self._read_all, name="dengine-control", daemon=True)
        self._thread.start()

    def begin_run(self) -> Run:
        """The next run of this rank. Ranks begin their runs in the same order. Never communicates."""
        with self._lock:
            run = self._run(self._num_runs)
            self._runs.pop(self._num_runs - _KEPT_RUNS, None)
            self._num_runs += 1
        return run

    def publish(self, **message: Any) -> None:
        """Append a message to the list that all ranks read."""
        number = self._writer.add("messages", 1) - 1
        self._writer.set(f"message/{number}", json.dumps(message))

    def close(self) -> None:
        """End the thread; the ranks have nothing more to tell."""
        self._is_closed = True
        with suppress(RuntimeError):  # the store is gone: so is the thread
            self.publish(kind="left", rank=self._here.rank)  # it waits for a message
        self._thread.join(timeout=1.0)

    def _run(self, number: int) -> Run:
        """Known here or not yet: another rank may speak of a run that this one has still to begin."""
        return self._runs.setdefault(number, Run(number, self))

    def _read_all(self) -> None:
        number = 0
        try:
            while not self._is_closed:
                message = self._next(number)
                if message is not None:
                    self._handle(number, message)
                    number += 1
                self._collect()
        except Exception:  # the store is gone, with the process that hosted it
            self.is_lost = True

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
        if message["kind"] == "left":
            return
        with self._lock:
            run = self._run(message["run"])
        key = (message["scope"], message["epoch"])
        if message["kind"] == "decided":
            run.decide(key, message["target"])
            return
        # The first wish of its kind counts; every rank reads them in one order, and leaves out the same ones.
        if key in run.heard:
            return
        run.heard.add(key)
        run.hold(key)
        run.interrupt()
        self._reader.set(f"begun/{number}/{self._here.rank}", str(run.begun))
        if self._here.rank == 0:
            self._collected[number] = message

    def _collect(self) -> None:
        """On rank 0: where every rank has told how far it has begun, decide for the furthest."""
        for number, message in list(self._collected.items()):
            keys = [f"begun/{number}/{rank}" for rank in range(self._here.size)]
            if self._reader.check(keys):
                target = max(int(begun) for begun in self._reader.multi_get(keys))
                self.publish(**{**message, "kind": "decided", "target": target})
                del self._collected[number]


def _nothing() -> None:
    pass


def _connect(host: str, port: int, prefix: str) -> Any:
    # Clients of their own: a thread that waits on a connection keeps everybody else off it.
    return PrefixStore(prefix, TCPStore(host, port, is_master=False, wait_for_workers=False))
