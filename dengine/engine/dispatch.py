"""The registered events of one engine and their handlers: attach, fire, detach."""

from __future__ import annotations

import difflib
from enum import Enum
from typing import TYPE_CHECKING

from dengine.checks import number
from dengine.distributed import rank_zero_only as only_on_rank_zero
from dengine.engine.events import AnyEvent, Events, FilteredEvent, Subscribable, event_parts, event_text
from dengine.engine.handler_checks import check_handler, is_collective, owner_of, phase_of, precedes_saves, warn_of_idle
from dengine.engine.handler_list import Gate, Handler, HandlerList, Subscription
from dengine.engine.state import State
from dengine.naming import describe

if TYPE_CHECKING:
    from dengine.engine.engine import Engine

__all__ = ["Dispatcher", "HandlerHandle"]

# The loop counts these itself; every other event is counted by its list.
_PER_ITERATION = (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
_PER_EPOCH = (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
_PER_FETCH = (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED)
_BEFORE_STEP = (*_PER_FETCH, Events.ITERATION_STARTED)


class Dispatcher:
    """The registered events of one engine and the handlers of each. `gate` is that of the events before a step."""

    def __init__(self, *events: type[Enum] | Enum | str) -> None:
        self._lists: dict[int | str, HandlerList] = {}
        self.gate = Gate()
        self.register(*events)

    def register(self, *events: type[Enum] | Enum | str) -> None:
        """Register more events.

        Raises: TypeError: one is not an event; nothing is registered then.
        """
        members: list[AnyEvent] = []
        for event in events:
            if isinstance(event, type) and issubclass(event, Enum):
                members.extend(event)
            elif isinstance(event, (Enum, str)):
                members.append(event)
            else:
                raise TypeError(f"register_events() takes enum classes, enum members or strings, but got {event!r}.")
        for member in members:
            if _key(member) not in self._lists:
                self._lists[_key(member)] = HandlerList(member, self.gate if member in _BEFORE_STEP else None)

    def handlers(self, event: AnyEvent) -> HandlerList:
        """The handlers of `event`.

        Raises:
            ValueError: it is not registered; the message lists the registered events and names the closest.
        """
        handlers = self._lists.get(_key(event))
        if handlers is None:
            raise ValueError(self._unknown(event))
        return handlers

    def parts(self, event: Subscribable) -> list[tuple[HandlerList, FilteredEvent]]:
        """The handler list and the options of each event in `event`.

        Raises: TypeError: it is no event. ValueError: one is not registered.
        """
        return [(self.handlers(part.event), part) for part in event_parts(event)]

    def attach(self, event: Subscribable, handler: Handler, *, priority: float, rank_zero_only: bool) -> HandlerHandle:
        """Attach `handler` to `event`.

        Raises: TypeError: the handler cannot be called as `handler(engine)`, `event` is no event, or `priority` is no
            number. ValueError: the event is not registered.
        """
        parts = self.parts(event)
        check_handler(handler)
        priority = number("priority", priority)
        phase = phase_of(handler)
        called: Handler = only_on_rank_zero(handler) if rank_zero_only else handler
        attached = [(handlers, Subscription(called, options, priority, phase)) for handlers, options in parts]
        for handlers, subscription in attached:
            handlers.add(subscription)
        return HandlerHandle(attached)

    def fire(self, engine: Engine, event: AnyEvent) -> None:
        """Call the handlers of `event`. The loop does this itself for the events of an iteration."""
        handlers = self.handlers(event)
        if not handlers.subscriptions:
            handlers.count += 1
        elif event in _PER_ITERATION or event in _PER_EPOCH:
            # If the user fires it, a count may come twice: neither call replaces the other.
            handlers.rewind()
            handlers.fire(engine, engine.state.iteration if event in _PER_ITERATION else engine.state.epoch + 1)
            handlers.rewind()
        else:
            handlers.count += 1
            handlers.fire(engine, handlers.count)

    def rewind(self) -> None:
        """Set the counts of the events to 0, as a run starts."""
        for handlers in self._lists.values():
            handlers.count = 0
            if handlers.subscriptions:
                handlers.rewind()

    def collectives(self) -> list[str]:
        """The names of the handlers that all ranks must have, in the order in which an event calls them."""
        return [
            f"{owner_of(subscription.handler)} at {event_text(subscription.options)}"
            + (" and before saves" if precedes_saves(subscription.handler) else "")
            for handlers in self._lists.values()
            for subscription in handlers.subscriptions
            if is_collective(subscription.handler)
        ]

    def before_saves(self) -> list[Handler]:
        """The handlers that are also called before each save, each once, in the order in which an event calls them."""
        handlers = [each.handler for handlers in self._lists.values() for each in handlers.subscriptions]
        return list(dict.fromkeys(each for each in handlers if precedes_saves(each)))

    def warn_of_idle(self, state: State) -> None:
        """Warn of handlers that a whole run, from its beginning, could not call: no run of this length will."""
        idle = []
        for handlers in self._lists.values():
            count = handlers.count
            if handlers.event in _PER_EPOCH:
                count = state.epochs_completed
            elif handlers.event in _PER_ITERATION or handlers.event in _PER_FETCH:
                count = state.iteration
            for each in handlers.idle(count):
                idle.append(f"{describe(each.handler)} at {event_text(each.options)}, which came {count}x")
        if idle:
            warn_of_idle(idle)

    def _unknown(self, event: AnyEvent) -> str:
        known = {str(handlers.event): handlers.event for handlers in self._lists.values()}
        by_short_name = {name.rpartition(".")[2].lower(): name for name in known}
        wanted = str(event).rpartition(".")[2].lower()
        close = difflib.get_close_matches(wanted, by_short_name, n=1, cutoff=0.4)
        hint = f" Did you mean {by_short_name[close[0]]}?" if close else ""
        return (
            f"{event!r} is not registered with this engine.{hint} Registered are: {', '.join(known)}. "
            "An event of your own is registered by engine.register_events(...)."
        )


class HandlerHandle:
    """A handler that is attached to events, as `Engine.on` gives it. `remove()` detaches it; a second call does
    nothing.
    """

    def __init__(self, attached: list[tuple[HandlerList, Subscription]]) -> None:
        self._attached = attached

    def __repr__(self) -> str:
        if not self._attached:
            return "HandlerHandle(removed)"
        events = " | ".join(event_text(subscription.options) for _, subscription in self._attached)
        return f"HandlerHandle({describe(self._attached[0][1].handler)} at {events})"

    def remove(self) -> None:
        for handlers, subscription in self._attached:
            handlers.remove(subscription)
        self._attached = []


def _key(event: AnyEvent) -> int | str:
    # By identity: a member of an enum that is also a str would equal that of another enum, or a registered string.
    return id(event) if isinstance(event, Enum) else event
