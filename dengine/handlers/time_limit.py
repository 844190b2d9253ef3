"""End a run after a given time."""

import math
import time

from dengine.checks import number
from dengine.engine import Engine
from dengine.naming import other_keywords, other_names, shown

__all__ = ["TimeLimit"]

_SECONDS = "a number of seconds above 0"


@other_names(
    attach="it takes one event, so write trainer.on(Events.ITERATION_COMPLETED, handler)",
)
class TimeLimit:
    """Stops the run, on all ranks at the same iteration, once `seconds` have passed since the handler was made.

    If the script makes it first, it counts the time of the whole script. The first rank whose clock reaches the limit
    stops all of them.

    Attach it on every rank: `trainer.on(Events.ITERATION_COMPLETED, TimeLimit(3600))`.

    Raises:
        TypeError, ValueError: `seconds` is not a number above 0.

    Example:
        >>> from dengine import Engine, Events
        >>> trainer = Engine(lambda engine, batch: time.sleep(0.01))
        >>> handle = trainer.on(Events.ITERATION_COMPLETED, TimeLimit(0.05))
        >>> trainer.run(range(1000)).iteration < 10
        True
    """

    @other_keywords(
        limit_sec="it is called seconds=",
    )
    def __init__(self, seconds: float) -> None:
        seconds = number("seconds", seconds, _SECONDS, above=0)
        if math.isinf(seconds):
            raise ValueError(f"seconds={seconds} must be {_SECONDS}.")
        self._seconds = seconds
        self._end_s = time.monotonic() + seconds

    def __repr__(self) -> str:
        return shown(self, seconds=self._seconds)

    def __call__(self, engine: Engine) -> None:
        if time.monotonic() >= self._end_s:
            engine.terminate()
