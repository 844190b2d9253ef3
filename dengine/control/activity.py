"""The activity of this rank, as its threads see it. It costs the loop nothing, which keeps these numbers anyway."""

import sys
import time

from dengine.control.call_log import CallLog
from dengine.control.failure import Level
from dengine.control.run import Runs

__all__ = ["Activity"]


class Activity:
    """The runs of this rank, its collective calls, and the time since its last progress.

    Attributes:
        num_ticks: calls of `distributed.progress()`.
        num_exempt: the number of parts of the script around this rank that may take any time.
        progressed_at_s: the time (of `time.monotonic()`) at which this rank was first seen at its present position.
    """

    def __init__(self, runs: Runs, call_log: CallLog) -> None:
        self.runs = runs
        self.call_log = call_log
        self.num_ticks = 0
        self.num_exempt = 0
        self.progressed_at_s = time.monotonic()
        self._progress: object = None

    def position(self) -> tuple[Level, ...]:
        """The position of the loop; empty outside of a run."""
        try:
            return self._position_by_stack()
        except Exception:  # frames of another thread, which goes on meanwhile: that is no failure
            return ()

    def _position_by_stack(self) -> tuple[Level, ...]:
        frame = sys._current_frames().get(self.runs.thread_id)
        frames = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        try:
            return self.runs.where(frames[::-1])
        finally:
            frames.clear()  # else, in the same thread, this frame would be in its own list, and hold all that called it

    def note_progress(self, position: tuple[Level, ...]) -> None:
        started = tuple(run.started for run in self.runs.under_way)
        calls = (self.call_log.num_calls, self.call_log.is_inside)
        progress = (self.runs.num_run_boundaries, started, calls, self.num_ticks, position)
        if progress != self._progress:
            self._progress = progress
            self.progressed_at_s = time.monotonic()

    def is_awaiting_others(self) -> bool:
        """Whether a stall of the others matters to this rank: it is in a run, or waits for them outside of one."""
        return bool(self.runs.shared()) or self.call_log.is_inside
