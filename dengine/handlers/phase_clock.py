"""The time that this rank itself needs for each phase of an iteration, without its waits for other ranks."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol

import torch

__all__ = ["PHASES", "SUMS", "DeviceStamps", "HostStamps", "PhaseClock", "Stamps", "stamps_for"]

PHASES = ("data", "forward", "backward", "step", "handlers")

SUMS = ("steps", "passes", "squares", "around_squares", *PHASES)

_WAIT = "wait"


class Stamps(Protocol):
    """A clock whose readings may not be there at once."""

    def now(self) -> Any: ...
    def is_past(self, stamp: Any) -> bool: ...
    def seconds(self, begin: Any, end: Any) -> float: ...


class HostStamps:
    """The clock of the host."""

    def __init__(self, read: Callable[[], float] = perf_counter) -> None:
        self.now = read

    def is_past(self, stamp: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class DeviceStamps:
    """Events of a GPU: the time at which its stream comes to where the host was. The host does not wait for it.

    What the host does while the GPU is busy with earlier work takes no time then, as nobody waits for it; a GPU that
    waits for its host, or for another rank's, shows.
    """

    def now(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_past(self, stamp: Any) -> bool:
        return bool(stamp.query())

    def seconds(self, begin: Any, end: Any) -> float:
        return 1e-3 * float(begin.elapsed_time(end))


def stamps_for(device: torch.device) -> Stamps:
    return DeviceStamps() if device.type == "cuda" else HostStamps()


class PhaseClock:
    """Sums the time of the steps of an epoch by phase.

    The first step after it is made is left out: it may compile, and starts the workers of a loader.

    Attributes:
        num_passes: the number of backward passes of which it was told.
        num_steps: the number of steps whose times are known.
        seconds: the sum of each phase.
        squares: the sum of the squares of each step's whole time; around_squares: of its data and handlers.
    """

    def __init__(self, stamps: Stamps) -> None:
        self._stamps = stamps
        self._marks: list[tuple[str, Any]] = []  # of the step under way: a phase, and when it began
        self._unread: deque[list[tuple[str, Any]]] = deque()
        self._is_first = True
        self._passes_before = 0
        self._num_waits = 0  # around what is under way
        self.phase = ""  # "" between two steps
        self.start_epoch()

    def start_epoch(self) -> None:
        """Set all sums to 0, and forget the step under way."""
        self.num_steps = self.num_passes = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.squares = self.around_squares = 0.0
        self.phase = ""
        self._unread.clear()

    def begin_step(self) -> None:
        """Begin a step, by its data."""
        self._marks, self._num_waits, self._passes_before = [], 0, self.num_passes
        self.switch("data")

    def begin_call(self) -> None:
        """Begin the call of the process function: with its forward pass, if there will be a backward pass."""
        self.switch("forward")

    def switch(self, phase: str) -> None:
        """Count the time from now on for `phase`."""
        self.phase = phase
        if not self._num_waits:
            self._marks.append((phase, self._stamps.now()))

    def end_step(self) -> None:
        """End the step, and read those whose times have come."""
        if not self.phase:
            return
        self.switch("")
        if self._is_first:
            self._is_first = False
            return
        if self.num_passes == self._passes_before:  # nobody told the parts of this step
            self._marks = [("step" if phase == "forward" else phase, stamp) for phase, stamp in self._marks]
        self._unread.append(self._marks)
        self.read()

    def read(self) -> None:
        """Add the steps that are past to the sums."""
        while self._unread and self._stamps.is_past(self._unread[0][-1][1]):
            self._add(self._unread.popleft())

    def wait_begins(self) -> None:
        """Count the time until `wait_ended` for no phase."""
        if self.phase and not self._num_waits:
            self._marks.append((_WAIT, self._stamps.now()))
        self._num_waits += 1

    def wait_ended(self) -> None:
        self._num_waits = max(self._num_waits - 1, 0)
        if self.phase:
            self.switch(self.phase)

    def sums(self) -> list[float]:
        """The sums of this epoch, in the order of `SUMS`."""
        times = [self.seconds[phase] for phase in PHASES]
        return [float(self.num_steps), float(self.num_passes), self.squares, self.around_squares, *times]

    def _add(self, marks: list[tuple[str, Any]]) -> None:
        step = dict.fromkeys((*PHASES, _WAIT), 0.0)
        for (phase, begin), (_, end) in pairwise(marks):
            step[phase] += self._stamps.seconds(begin, end)
        del step[_WAIT]
        for phase, seconds in step.items():
            self.seconds[phase] += seconds
        self.num_steps += 1
        self.squares += sum(step.values()) ** 2
        self.around_squares += (step["data"] + step["handlers"]) ** 2
