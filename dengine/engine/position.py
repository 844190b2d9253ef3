"""Where the engines of this process are, read from the stack: the loop itself notes nothing for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from dengine.control.failure import Level
from dengine.control.stop import END
from dengine.engine.dispatch import Channel
from dengine.naming import describe

if TYPE_CHECKING:
    from dengine.engine.loop import Engine

__all__ = ["frames_here", "levels", "running"]


def frames_here() -> Iterator[FrameType]:
    """The frames of this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def running(loop: CodeType, frames: Iterable[FrameType]) -> list[Engine]:
    """The engines that run in `frames`, in that order. `loop` is the code that an engine runs in."""
    return [frame.f_locals["self"] for frame in frames if frame.f_code is loop]


def levels(loop: CodeType, frames: Iterable[FrameType]) -> list[Level]:
    """The engines that run in `frames` (outermost first), in that order. `loop` is the code that an engine runs in."""
    found: list[Level] = []
    engine: Engine | None = None
    for frame in frames:
        if frame.f_code is loop:
            engine = frame.f_locals["self"]
            found.append(_level(engine, _doing(engine)))
        elif engine is not None and frame.f_code is Channel.fire.__code__ and frame.f_locals["engine"] is engine:
            found[-1] = _in_handler(engine, frame)
    return found


def _level(engine: Engine, doing: str, event: str | None = None, handler: str | None = None) -> Level:
    return Level(engine.state.epoch, engine.state.iteration, doing, event, handler)


def _in_handler(engine: Engine, fire: FrameType) -> Level:
    event = str(fire.f_locals["self"].event).removeprefix("Events.")
    called = fire.f_locals.get("handler")
    if called is None and "subscription" in fire.f_locals:
        called = fire.f_locals["subscription"].handler
    handler = describe(called)
    return _level(engine, f"in handler {handler} of {event}", event, handler)


def _doing(engine: Engine) -> str:
    """What the loop is at, by the numbers that it keeps: how far it has begun, and how far it has got."""
    state, run = engine.state, engine._run
    started = -1 if run is None or run.started < 0 else run.started & END
    if started <= 0:
        return "at the start of the run" if started < 0 else "at the start of the epoch"
    if started == END:
        return "at the epoch's end, with its metrics"
    if started > state.epoch_iteration:
        return f"fetching batch {started} of the epoch"
    if engine._iterations_done < state.iteration:
        return f"in the step {describe(engine._step)}"
    return "updating the metrics"
