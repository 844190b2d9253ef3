"""The end of a run: the limits that the arguments of `run()` set, and stops that the ranks agree on."""

from __future__ import annotations

from dengine.control.run import Run, position
from dengine.engine.handler_list import NEVER
from dengine.engine.state import State

__all__ = ["PREEMPTED", "Limits"]

PREEMPTED = "preempted"  # as the reason why a run is left


class Limits:
    """Decides when one run and its epochs end.

    The loop leaves the epoch if `iteration >= run.stop_at`: one comparison for all reasons to end. A rank's thread sets
    it to 0 (`Run.interrupt`), so that the loop asks here.
    """

    def __init__(self, state: State, run: Run, *, max_iterations: int | None, stop_every: int) -> None:
        self.run = run
        self.max_iterations = NEVER if max_iterations is None else max_iterations
        self.stop_every = stop_every
        self.is_terminated = False
        self._state = state

    def may_begin(self, next_position: int) -> bool:
        """Publish that `next_position` (an epoch, or its end) has started, unless all ranks leave the run before it."""
        run = self.run
        run.started = next_position
        if run.must_check and next_position > run.stop_targets(self._state.epoch)[0]:
            self.is_terminated = True
            self._state._preempted = run.reason == PREEMPTED
        return not self.is_terminated

    def may_go_on(self, end: int) -> bool:
        """Whether this epoch has another iteration. It ends at `end`, unless it is left before."""
        state, run = self._state, self.run
        stop_at = run.stop_at = min(end, self.max_iterations)
        if run.must_check:
            epoch_start = state.iteration - state.epoch_iteration
            for target in run.stop_targets(state.epoch):
                if target is not None:
                    num_iterations = max(target - position(state.epoch, 0), 0)
                    num_iterations += -num_iterations % self.stop_every
                    stop_at = min(stop_at, epoch_start + num_iterations)
            # The thread may set it to 0 again right after: then the loop only comes here once more.
            run.stop_at = stop_at
        return state.iteration < stop_at

    def has_ended(self, end: int) -> bool:
        """Whether the epoch that was left is complete: it has reached its end, or `terminate_epoch()` ended it."""
        is_left = self._epoch_target() is not None  # asked in any case: it raises if another rank has failed
        return self._state.iteration >= end or is_left

    def is_skipped(self) -> bool:
        """Whether the epoch ended without an iteration on any rank."""
        return self._epoch_target() == position(self._state.epoch, 0)

    def _epoch_target(self) -> int | None:
        return self.run.stop_targets(self._state.epoch)[1] if self.run.must_check else None
