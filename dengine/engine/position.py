"""The positions of the engines of this process, read from the stack, so that they cost the loop nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from dengine.control.failure import Level
from dengine.control.run import END
from dengine.engine.handler_list import HandlerList
from dengine.engine.state import State
from dengine.naming import describe

if TYPE_CHECKING:
    from dengine.engine.engine import Engine
    from dengine.engine.loop import Loop

__all__ = ["levels", "loops_here"]


def loops_here(code: CodeType) -> list[Loop]:
    """The loops that run in this thread, the innermost first. `code` is the code of a loop's frame."""
    return [frame.f_locals["self"] for frame in _frames_here() if frame.f_code is code]


def levels(code: CodeType, frames: Iterable[FrameType]) -> list[Level]:
    """The engines that run in `frames` (outermost first), in that order. `code` is the code of a loop's frame."""
    found: list[Level] = []
    loop: Loop | None = None
    for frame in frames:
        if frame.f_code is code:
            loop = frame.f_locals["self"]
            found.append(_level(loop.state, _doing(loop)))
        elif loop is not None and _fires_for(loop.engine, frame):
            found[-1] = _in_handler(loop.state, frame)
    return found


def _fires_for(engine: Engine, frame: FrameType) -> bool:
    return frame.f_code is HandlerList.fire.__code__ and frame.f_locals["engine"] is engine


def _frames_here() -> Iterator[FrameType]:
    """The frames of this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _level(state: State, doing: str, event: str | None = None, handler: str | None = None) -> Level:
    return Level(state.epoch, state.iteration, doing, event, handler)


def _in_handler(state: State, fire: FrameType) -> Level:
    event = str(fire.f_locals["self"].event).removeprefix("Events.")
    called = fire.f_locals.get("handler")
    if called is None and "subscription" in fire.f_locals:
        called = fire.f_locals["subscription"].handler
    handler = describe(called)
    return _level(state, f"in handler {handler} of {event}", event, handler)


def _doing(loop: Loop) -> str:
    """A text that says what the loop is doing, from its two counts: iterations started, and iterations done."""
    state, run = loop.state, loop.limits.run
    started = -1 if run.started < 0 else run.started & END
    if started <= 0:
        return "at the start of the run" if started < 0 else "at the start of the epoch"
    if started == END:
        return "at the epoch's end, with its metrics"
    if started > state.epoch_iteration:
        return f"fetching batch {started} of the epoch"
    if state._under_way:
        return f"in the step {describe(loop.step)}"
    return "updating the metrics"
