"""Handlers that follow each step, an average of weights or a schedule: set back with the steps, and called again."""

from __future__ import annotations

from typing import Any

from dengine.engine import Engine, Events
from dengine.engine.events import AnyEvent
from dengine.engine.handler_list import Subscription
from dengine.engine.phases import Phase
from dengine.engine.repeats import Repeats
from dengine.handlers.ema import EMA
from dengine.handlers.lr_scheduler import LRScheduler

__all__ = ["StepFollowers"]


class StepFollowers:
    """The handlers of one engine that follow its steps.

    Attributes:
        step_event: the event of a step, if there is one.
        are_ahead: whether they are called before a step is judged; else they see only good steps, and there is
            nothing to set back.
    """

    def __init__(self, repeats: Repeats, *, are_ahead: bool) -> None:
        self._repeats = repeats
        self.step_event: AnyEvent | None = None
        self.are_ahead = are_ahead

    @property
    def has_schedule(self) -> bool:
        """Whether the learning rates of steps that are done again come from a schedule that was set back."""
        return any(isinstance(each, LRScheduler) for each in self._by_name().values())

    def states(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self._by_name().items()}

    def load(self, states: dict[str, Any]) -> None:
        for name, each in self._by_name().items():
            if name in states:
                each.load_state_dict(states[name])

    def call(self, engine: Engine, iteration: int, *, has_stepped: bool) -> None:
        """Call them for an iteration that was done again."""
        called = self._of(self.step_event) if has_stepped else []
        for each in [*called, *self._of(Events.ITERATION_COMPLETED)]:
            if each in called or each.admits(iteration):
                each.handler(engine)

    def has_listeners(self) -> bool:
        """Whether another handler needs to know of each step whether it was left out."""
        if self.step_event is None:
            return False
        known = [each for each in self._of(self.step_event) if each.is_plain]
        of_event = self._repeats.subscriptions(self.step_event)
        return any(each not in known and each.turn[1] is not Phase.SAVE for each in of_event)

    def _of(self, event: AnyEvent | None) -> list[Subscription]:
        if event is None or not self.are_ahead:
            return []
        return [each for each in self._repeats.subscriptions(event) if isinstance(each.handler, EMA | LRScheduler)]

    def _by_name(self) -> dict[str, EMA | LRScheduler]:
        found = [*self._of(self.step_event), *self._of(Events.ITERATION_COMPLETED)]
        return {str(id(each.handler)): each.handler for each in found}  # type: ignore[misc]
