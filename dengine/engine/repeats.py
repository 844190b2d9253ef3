"""Steps that do not count once each: left out by a `Guard`, run again by it, or rehearsed by a `Replay`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import ref

from dengine.engine.data.joined import Absent
from dengine.engine.events import AnyEvent, Events
from dengine.engine.handler_list import Subscription

if TYPE_CHECKING:
    from dengine.engine.engine import Engine

__all__ = ["Repeats", "StepGuard", "follows_left_out_step"]


class StepGuard(Protocol):
    """What judges the steps of an engine: a `Guard`."""

    is_late: bool  # whether a step is judged some iterations after it

    def flush(self, engine: Engine) -> None: ...  # judges all steps so far; collective


class Repeats:
    """What a `Guard` and a `Replay` share with an engine, its step and its other handlers.

    Attributes:
        guard: the guard of this engine, if it has one.
        is_left_out: whether the step of the current iteration was left out, so that what follows a step is left out.
        is_rehearsal: whether the step runs only to be compared, and is broken off before the optimizer steps.
        start_over: functions that forget what a step that was broken off has begun; for steps with a state.
        remember: functions that give a function that sets a step's own state back to what it is now.
    """

    def __init__(self, engine: Engine) -> None:
        self._reference = ref(engine)  # which refers to this: it is freed without the garbage collector
        self.guard: StepGuard | None = None
        self.is_left_out = False
        self.is_rehearsal = False
        self.start_over: list[Callable[[], None]] = []
        self.remember: list[Callable[[], Callable[[], None]]] = []
        self._wrapped: Absent | None = None

    @property
    def _engine(self) -> Engine:
        engine = self._reference()
        assert engine is not None
        return engine

    @property
    def step(self) -> Callable[..., object]:
        """The step of the engine."""
        return self._engine._step

    def forget_started(self) -> None:
        """Forget what a step that was broken off has begun."""
        for forget in self.start_over:
            forget()

    def run(self, iteration: int, batch: object) -> object:
        """Run the step of an iteration of this epoch, the current or an earlier one, without its events, and give its
        output. Position and batch are put back.
        """
        engine, state = self._engine, self._engine.state
        present = state._iteration, state._iterations_done, state.batch
        state._iteration, state._iterations_done, state.batch = iteration, iteration - 1, batch
        try:
            return engine._step(engine, batch)
        finally:
            state._iteration, state._iterations_done, state.batch = present

    def hold_back(self) -> None:
        """Leave the output of the current iteration out of the metrics, until `release`."""
        state = self._engine.state
        if type(state.batch) is not Absent:
            state.batch = self._wrapped = Absent(state.batch)

    def release(self) -> bool:
        """Give the iteration its batch back. Whether its output was held back."""
        wrapped, self._wrapped = self._wrapped, None
        if wrapped is None:
            return False
        if self._engine.state.batch is wrapped:
            self._engine.state.batch = wrapped.spare
        return True

    def subscriptions(self, event: AnyEvent) -> tuple[Subscription, ...]:
        """The handlers of `event`, in the order of calling."""
        return self._engine._dispatcher.handlers(event).subscriptions

    def count(self, output: object) -> None:
        """Update the metrics with an output that was held back."""
        if self._engine._metrics.updates:
            self._engine._metrics.update(output)


def follows_left_out_step(engine: Engine | None) -> bool:
    """Whether a handler is called after an iteration whose step was left out. In a loop without an engine none is."""
    return engine is not None and engine.repeats.is_left_out and engine.firing is Events.ITERATION_COMPLETED
