"""The handlers of one event: their options as integers that are cheap to compare, and the loop that calls them."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from dengine.engine.events import AnyEvent, Events, FilteredEvent
from dengine.engine.handler_checks import warn_of_failure
from dengine.engine.phases import Phase

if TYPE_CHECKING:
    from dengine.engine.engine import Engine

__all__ = ["NEVER", "Gate", "Handler", "HandlerList", "Subscription"]

Handler: TypeAlias = "Callable[[Engine], object]"

# A count that is never reached: no handler is due.
NEVER = sys.maxsize


class Subscription:
    """One handler of one event, with its options as integers that the loop compares."""

    __slots__ = (
        "due",
        "filter",
        "first",
        "handler",
        "is_known_idle",
        "is_plain",
        "last",
        "once",
        "options",
        "step",
        "turn",
    )

    def __init__(self, handler: Handler, options: FilteredEvent, priority: float, phase: Phase) -> None:
        self.handler = handler
        self.options = options
        self.is_known_idle = False  # the counts of a run do not reach it, and the user was warned
        self.turn = (-priority, phase)
        self.step = options.every or 1
        self.once = options.once
        self.first = 0 if options.after is None else options.after + 1
        self.last = NEVER if options.before is None else options.before - 1
        self.filter = options.filter
        self.is_plain = options == FilteredEvent(options.event)
        # The next count that needs a look; 0 means: look at the next one, whatever it is.
        self.due = 0

    def call(self, engine: Engine, count: int) -> None:
        if self.filter is None or self.filter(engine, count):
            self.handler(engine)

    def admits(self, count: int) -> bool:
        """Whether the integer options allow `count`. `filter` is called later, just before the handler."""
        if self.once is not None and count not in self.once:
            return False
        return self.first <= count <= self.last and count % self.step == 0

    def due_after(self, count: int) -> int:
        """The smallest count above `count` that the integer options may allow."""
        if self.is_plain:
            return 0
        following = max(count + 1, self.first)
        if self.once is not None:
            index = bisect_right(self.once, following - 1)
            following = self.once[index] if index < len(self.once) else NEVER
        else:
            following += -following % self.step
        return following if following <= self.last else NEVER


class Gate:
    """The number of the iteration before which no handler of what precedes a step is due: one comparison for three
    events.

    It keeps numbers, not the lists, which refer to it: an engine is freed without the garbage collector.
    """

    __slots__ = ("_dues", "due")

    def __init__(self) -> None:
        self.due = NEVER
        self._dues: dict[AnyEvent, int] = {}

    def note(self, event: AnyEvent, due: int) -> None:
        """Take over the `due` of a list. One that counts fetches of a batch is looked at in each iteration."""
        self._dues[event] = due if event is Events.ITERATION_STARTED or due == NEVER else 0
        self.due = min(self._dues.values())


class HandlerList:
    """The subscriptions of one event, as one tuple in the order of calling.

    `due` is the smallest count at which a handler is to be called. The loop only compares with it in an iteration in
    which no handler is due. `gate` is told of each change of it.
    """

    __slots__ = ("count", "due", "due_with_options", "event", "gate", "plain_handlers", "subscriptions")

    def __init__(self, event: AnyEvent, gate: Gate | None = None) -> None:
        self.event = event
        self.gate = gate
        self.count = 0  # times fired in this run; the loop keeps the counts of iterations and epochs itself
        self.due = NEVER
        self.due_with_options = NEVER  # the same for those with options, which need no look before
        self.subscriptions: tuple[Subscription, ...] = ()
        self.plain_handlers: tuple[Handler, ...] = ()  # handlers without options

    def add(self, subscription: Subscription) -> None:
        # sorted() is stable: registration order within one priority.
        self._set(tuple(sorted((*self.subscriptions, subscription), key=lambda each: each.turn)))

    def remove(self, subscription: Subscription) -> None:
        self._set(tuple(each for each in self.subscriptions if each is not subscription))

    def idle(self, count: int) -> list[Subscription]:
        """The subscriptions whose counts are all above `count`, so that a run that ends there never calls them. Each
        once.
        """
        found = []
        for subscription in self.subscriptions:
            if subscription.due_after(0) > count > 0 and not subscription.is_known_idle:
                subscription.is_known_idle = True
                found.append(subscription)
        return found

    def rewind(self) -> None:
        """Look at every subscription on the next firing: counts restart, or may jump."""
        for subscription in self.subscriptions:
            subscription.due = 0
        self._look_for_due()

    def fire(self, engine: Engine, count: int) -> None:
        """Call the handlers that are due at `count`. They are chosen before the first call."""
        outer, engine.firing = engine.firing, self.event
        try:
            if count < self.due_with_options:
                for handler in self.plain_handlers:
                    handler(engine)
            else:
                for subscription in self.ready(count):
                    subscription.call(engine, count)
        finally:
            engine.firing = outer

    def fire_despite(self, engine: Engine, error: BaseException) -> None:
        """Call all handlers because of `error`. If one of them raises, that hides neither `error` nor the other
        handlers.
        """
        engine.firing = self.event
        try:
            for subscription in self.ready(1):
                _call_despite(subscription, engine, error)
        finally:
            engine.firing = None

    def ready(self, count: int) -> list[Subscription]:
        """The subscriptions that are due at `count`. Their `filter` is called later, just before each handler."""
        ready = []
        for subscription in self.subscriptions:
            if subscription.due <= count:
                if subscription.admits(count):
                    ready.append(subscription)
                subscription.due = subscription.due_after(count)
        self._look_for_due()
        return ready

    def _set(self, subscriptions: tuple[Subscription, ...]) -> None:
        # New tuples, never a changed one: a firing under way goes on with the tuple it began with.
        self.subscriptions = subscriptions
        self.plain_handlers = tuple(each.handler for each in subscriptions if each.is_plain)
        self._look_for_due()

    def _look_for_due(self) -> None:
        self.due_with_options = min((each.due for each in self.subscriptions if not each.is_plain), default=NEVER)
        self.due = 0 if self.plain_handlers else self.due_with_options
        if self.gate is not None:
            self.gate.note(self.event, self.due)


def _call_despite(subscription: Subscription, engine: Engine, error: BaseException) -> None:
    try:
        subscription.call(engine, 1)
    except Exception as failure:
        if failure is not error:
            warn_of_failure(failure, subscription.handler, error)
