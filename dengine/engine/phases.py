"""The phases of an event: the order among handlers of one priority."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dengine.engine.engine import Engine

__all__ = ["Phase", "SavePhase"]


class Phase(IntEnum):
    """A phase of an event. A handler chooses it by an attribute `phase`; without one, it is `ACT`."""

    ACT = 0  # in the order in which the handlers were attached
    SAVE = 1  # after the others of its priority, so that what they did is saved


class SavePhase:
    """The `SAVE` phase of the event that an engine fires.

    An event that is fired within another one (an optimizer's step within `ITERATION_COMPLETED`) can leave its savers to
    the event around it (`is_put_off`): they are called in that event's `SAVE` phase (`run`), after its other handlers.
    """

    def __init__(self) -> None:
        self.is_put_off = False
        self.waiting: list[Callable[[Engine], object]] = []

    def run(self, engine: Engine) -> None:
        """Call the actions that were put off."""
        waiting, self.waiting = self.waiting, []
        for action in waiting:
            action(engine)
