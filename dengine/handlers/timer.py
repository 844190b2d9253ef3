"""Measure the time of a run, its epochs or its steps."""

from __future__ import annotations

import math
import time

import torch

from dengine.engine import Engine, Events
from dengine.engine.events import Subscribable
from dengine.handlers.arguments import check_engine
from dengine.handlers.priorities import Priority
from dengine.naming import shown

__all__ = ["Timer"]


class Timer:
    """Measures seconds, and seconds a step, by this rank's clock. It is not a collective.

    Without `attach` it runs from the moment it is made. A GPU works asynchronously: what is measured is the loop, which
    waits for the device in the long run; with `synchronize`, the clock waits for the device at each event.

    Args:
        synchronize: wait for the device whenever the clock is started, stopped or read, so that a step's time is that
            of its work on the device. Cost: the loop can no longer run ahead of the device.

    Example:
        >>> from dengine import Engine, Events
        >>> trainer, timer = Engine(lambda engine, batch: time.sleep(0.01)), Timer()
        >>> timer.attach(trainer, start=Events.EPOCH_STARTED, step=Events.ITERATION_COMPLETED)
        >>> state = trainer.run(range(3))
        >>> timer.value() >= 0.03, timer.step_time() >= 0.01
        (True, True)
    """

    def __init__(self, *, synchronize: bool = False) -> None:
        self._synchronize = synchronize
        self._since_s: float | None = None  # None while the clock is stopped
        self.reset()
        self._run()

    def __repr__(self) -> str:
        return shown(self, synchronize=self._synchronize or None, num_steps=self._num_steps)

    def attach(
        self,
        engine: Engine,
        start: Subscribable = Events.STARTED,
        step: Subscribable | None = Events.ITERATION_COMPLETED,
        pause: Subscribable | None = None,
        resume: Subscribable | None = None,
    ) -> None:
        """Let events of `engine` control the clock, which stays at 0 until `start`. It stops when the run ends.

        Args:
            start: sets the clock to 0 and starts it.
            step: counts a step.
            pause, resume: the time between them is not counted: `resume=Events.ITERATION_STARTED,
                pause=Events.ITERATION_COMPLETED` measures the steps without the loading of the data.

        The clock starts before the other handlers of `start`, and stops and counts before those of `pause` and `step`;
        it goes on after those of `resume`.

        Raises:
            TypeError, ValueError: an argument is not an event, or one that is not registered; nothing is attached then.
        """
        check_engine(self, engine)
        wanted = [
            (start, self._start, Priority.EARLY),
            (pause, self._pause, Priority.EARLY),
            (step, self._step, Priority.EARLY),
            (resume, self._resume, Priority.LATE),
            (Events.COMPLETED | Events.EXCEPTION_RAISED, self._pause, Priority.EARLY),
        ]
        attached = []
        try:
            for event, handler, priority in wanted:
                if event is not None:
                    attached.append(engine.on(event, handler, priority=priority))
        except BaseException:
            for handle in attached:
                handle.remove()
            raise
        self._since_s = None
        self.reset()

    def value(self) -> float:
        """Seconds since the start, without pauses."""
        return self._passed_s + (0.0 if self._since_s is None else self._now() - self._since_s)

    def step_time(self) -> float:
        """Mean seconds a step, from the start to the last step; NaN before the first one."""
        return self._passed_at_step_s / self._num_steps if self._num_steps else math.nan

    def reset(self) -> None:
        """Set time and steps to 0. A running clock goes on running."""
        self._passed_s = 0.0
        self._passed_at_step_s = 0.0
        self._num_steps = 0
        if self._since_s is not None:
            self._since_s = self._now()

    # -- handlers ------------------------------------------------------------------------------------------------

    def _start(self, engine: Engine) -> None:
        self._since_s = None
        self.reset()
        self._run()

    def _pause(self, engine: Engine) -> None:
        self._passed_s = self.value()
        self._since_s = None

    def _resume(self, engine: Engine) -> None:
        self._run()

    def _step(self, engine: Engine) -> None:
        self._num_steps += 1
        self._passed_at_step_s = self.value()

    def _run(self) -> None:
        if self._since_s is None:
            self._since_s = self._now()

    def _now(self) -> float:
        if self._synchronize and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()
