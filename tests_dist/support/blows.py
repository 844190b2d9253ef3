"""Signals that a process sends itself at a chosen moment: kills and preemptions for tests of whole jobs."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Blow", "Striker"]

# What reaches the disk; of these, what there is is counted.
CALLS = ("open", "write", "writev", "pwrite", "fsync", "fdatasync", "rename", "replace", "unlink", "mkdir", "rmdir")


@dataclass(frozen=True)
class Blow:
    """A signal that one rank, or each (None), gets at a moment, which comes again and again: the time number `count`.

    moment: "seconds" after the start; a "call" that reaches the disk; while states are "load"ed; in iteration `count`
        "begun", "backward", "stepped", "saved"; in epoch `count` "epoch_started", "evaluating", "epoch_completed"; in a
        "worker" of the data loader, sample `100 * epoch + index`.
    whom: "group": this process and its children, as torchrun passes signals on; "parent": who has started it.
    """

    moment: str
    count: float = 1
    rank: int | None = None
    number: int = signal.SIGKILL
    whom: Literal["process", "group", "parent"] = "process"


class Striker:
    """Sends this process the blow when its moment comes. In the workers of the data loader it hits these."""

    def __init__(self, blow: Blow | None, rank: int) -> None:
        self._blow = blow if blow is not None and blow.rank in (None, rank) else None
        self._main = os.getpid()
        self.num_calls = 0
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        if self._blow is not None and self._blow.moment == "seconds":
            timer = threading.Timer(self._blow.count, self._hit)
            timer.daemon = True
            timer.start()

    def at(self, moment: str, count: int = 1) -> None:
        if self._blow is not None and (moment, count) == (self._blow.moment, self._blow.count):
            self._hit()

    def _hit(self) -> None:
        assert self._blow is not None
        whom = {"process": os.getpid(), "group": -os.getpgid(0), "parent": os.getppid()}[self._blow.whom]
        os.kill(whom, self._blow.number)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if os.getpid() == self._main:
                self.num_calls += 1
                blow = self._blow
                if blow is not None and (blow.moment, blow.count) == ("call", self.num_calls):
                    if name == "write":
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    self._hit()
            return real(*arguments, **options)

        return called
