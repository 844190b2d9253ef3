"""Who is called at which event: subscriptions, compiled when they are attached, and the loop over them."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from dengine.engine.events import AnyEvent, FilteredEvent, event_text
from dengine.naming import describe

if TYPE_CHECKING:
    from dengine.engine.loop import Engine

__all__ = [
    "NEVER",
    "Channel",
    "Dispatcher",
    "Handler",
    "HandlerHandle",
    "Subscription",
    "check_handler",
    "check_process_function",
    "collective",
    "warn_of_idle",
]

Handler: TypeAlias = "Callable[[Engine], Any]"
_C = TypeVar("_C", bound="Callable[..., Any]")

# The count at which nobody is ever due.
NEVER = sys.maxsize


class Subscription:
    """One handler on one event, its options turned into integers that are compared in place."""

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
        "place",
        "step",
    )

    def __init__(self, handler: Handler, options: FilteredEvent, priority: int) -> None:
        self.handler = handler
        self.options = options
        self.is_known_idle = False  # the counts of a run do not reach it, and that has been said
        # What saves comes behind the others of its priority: else what they do then would be lost to a resumed run.
        self.place = (-priority, bool(getattr(handler, "saves_state", False)))
        self.step = options.every or 1
        self.once = options.once
        self.first = 0 if options.after is None else options.after + 1
        self.last = NEVER if options.before is None else options.before - 1
        self.filter = options.filter
        self.is_plain = options == FilteredEvent(options.event)
        # No count below it needs a look; 0 means: look at the next one, whatever it is.
        self.due = 0

    def call(self, engine: Engine, count: int) -> None:
        if self.filter is None or self.filter(engine, count):
            self.handler(engine)

    def admits(self, count: int) -> bool:
        """Whether the integer options allow `count`; `filter` is asked later, when the handler's turn has come."""
        if self.once is not None and count not in self.once:
            return False
        return self.first <= count <= self.last and count % self.step == 0

    def due_after(self, count: int) -> int:
        """The smallest count above `count` that the integer options may allow."""
        if self.is_plain:
            return 0
        following = max(count + 1, self.first)
        if self.once is not None:
            place = bisect_right(self.once, following - 1)
            following = self.once[place] if place < len(self.once) else NEVER
        else:
            following += -following % self.step
        return following if following <= self.last else NEVER


class Channel:
    """One event's subscriptions, as one tuple in the order of calling.

    `due` is the smallest count at which anybody wants to be called: the loop compares with it and needs nothing else
    of a channel in an iteration in which nobody is due.
    """

    __slots__ = ("count", "due", "due_with_options", "event", "plain_handlers", "subscriptions")

    def __init__(self, event: AnyEvent) -> None:
        self.event = event
        self.count = 0  # times fired in this run; the loop keeps the counts of iterations and epochs itself
        self.due = NEVER
        self.due_with_options = NEVER  # the same of those that have options, to which nobody has to look before
        self.subscriptions: tuple[Subscription, ...] = ()
        self.plain_handlers: tuple[Handler, ...] = ()  # of those without options

    def add(self, subscription: Subscription) -> None:
        # sorted() is stable: registration order within one priority.
        self._set(tuple(sorted((*self.subscriptions, subscription), key=lambda each: each.place)))

    def remove(self, subscription: Subscription) -> None:
        self._set(tuple(each for each in self.subscriptions if each is not subscription))

    def idle(self, count: int) -> list[Subscription]:
        """Who could not be called in a run whose last count was `count`, all their counts being higher; each once."""
        found = []
        for subscription in self.subscriptions:
            if subscription.due_after(0) > count > 0 and not subscription.is_known_idle:
                subscription.is_known_idle = True
                found.append(subscription)
        return found

    def rewind(self) -> None:
        """Counts begin anew, or may jump: have everybody looked at on the next firing."""
        for subscription in self.subscriptions:
            subscription.due = 0
        self._look_for_due()

    def fire(self, engine: Engine, count: int) -> None:
        """Call everybody who is due at `count`. Who is called is settled before the first call."""
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
        """Call everybody for `error`. What one of them raises must not hide it, nor keep others from being called."""
        engine.firing = self.event
        try:
            for subscription in self.ready(1):
                _call_despite(subscription, engine, error)
        finally:
            engine.firing = None

    def ready(self, count: int) -> list[Subscription]:
        """Those who are due at `count`, but for their `filter`, which is asked when their turn has come."""
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


class Dispatcher:
    """The registered events of one engine and their channels."""

    def __init__(self) -> None:
        self._channels: dict[int | str, Channel] = {}

    def register(self, event: AnyEvent) -> None:
        self._channels.setdefault(_key(event), Channel(event))

    def channel(self, event: AnyEvent) -> Channel:
        """The channel of `event`.

        Raises:
            ValueError: not registered; it lists the registered events and names the closest.
        """
        channel = self._channels.get(_key(event))
        if channel is None:
            raise ValueError(self._unknown(event))
        return channel

    @property
    def channels(self) -> Iterable[Channel]:
        return self._channels.values()

    def rewind(self) -> None:
        for channel in self._channels.values():
            channel.count = 0
            channel.rewind()

    def collectives(self) -> list[str]:
        """The handlers that all ranks must have, in the order in which an event calls them."""
        return [
            f"{_owner(subscription.handler)} at {event_text(subscription.options)}"
            for channel in self._channels.values()
            for subscription in channel.subscriptions
            if getattr(_inside(subscription.handler), "is_collective", False)
        ]

    def _unknown(self, event: AnyEvent) -> str:
        known = {str(channel.event): channel.event for channel in self._channels.values()}
        by_short_name = {name.rpartition(".")[2].lower(): name for name in known}
        wanted = str(event).rpartition(".")[2].lower()
        close = difflib.get_close_matches(wanted, by_short_name, n=1, cutoff=0.4)
        hint = f" Did you mean {by_short_name[close[0]]}?" if close else ""
        return (
            f"{event!r} is not registered with this engine.{hint} Registered are: {', '.join(known)}. "
            "An event of your own is registered by engine.register_events(...)."
        )


class HandlerHandle:
    """What `Engine.on` returns: `remove()` takes the handler off its events again; a second call does nothing."""

    def __init__(self, attached: list[tuple[Channel, Subscription]]) -> None:
        self._attached = attached

    def __repr__(self) -> str:
        if not self._attached:
            return "HandlerHandle(removed)"
        events = " | ".join(event_text(subscription.options) for _, subscription in self._attached)
        return f"HandlerHandle({describe(self._attached[0][1].handler)} at {events})"

    def remove(self) -> None:
        for channel, subscription in self._attached:
            channel.remove(subscription)
        self._attached = []


def check_handler(handler: object) -> None:
    """Refuse what cannot be called as `handler(engine)`.

    Raises:
        TypeError: naming the handler and its signature.
    """
    if not callable(handler):
        hint = ""
        if hasattr(handler, "attach"):
            hint = f": it needs several events, so attach it by {type(handler).__qualname__}(...).attach(engine)"
        raise TypeError(f"A handler is called as handler(engine), but {handler!r} is not callable{hint}.")
    _check_call("Handler", handler, ("engine",), "Bind what else it needs, e.g. with functools.partial or a lambda.")


def check_process_function(function: object) -> None:
    """Refuse what cannot be called as `process_function(engine, batch)`.

    Raises:
        TypeError: naming the function and its signature.
    """
    if not callable(function):
        raise TypeError(f"Engine() takes a function (engine, batch) -> output, but got {function!r}.")
    _check_call(
        "The process function", function, ("engine", "batch"), "Its first argument is the engine, its second the batch."
    )


def _check_call(what: str, function: Callable[..., Any], arguments: tuple[str, ...], way_out: str) -> None:
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{what} {describe(function)} is an async function: a call of it would run nothing.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-ins tell nothing about their arguments
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        called = f"{'handler' if len(arguments) == 1 else 'process_function'}({', '.join(arguments)})"
        raise TypeError(
            f"{what} {describe(function)}{signature} cannot be called as {called}: {error}. {way_out}"
        ) from None


def collective(method: _C) -> _C:
    """Mark `method`, which is attached as a handler, as one that all ranks take part in: they compare which ones they
    have at the start of a run. A handler that is an object says so by an attribute `is_collective`.
    """
    method.is_collective = True  # type: ignore[attr-defined]
    return method


def _inside(handler: Any) -> Any:
    """The object or function that is called in the end: in a `functools.partial`, or by its `__call__`."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    is_call = getattr(handler, "__name__", "") == "__call__"
    return getattr(handler, "__self__", handler) if is_call else handler


def _owner(handler: Any) -> str:
    inside = _inside(handler)
    owner = getattr(inside, "__self__", None)
    return describe(inside) if owner is None else type(owner).__qualname__


def _key(event: AnyEvent) -> int | str:
    # By identity: an enum that is a str as well would equal another one's member, or a registered string.
    return id(event) if isinstance(event, Enum) else event


def _call_despite(subscription: Subscription, engine: Engine, error: BaseException) -> None:
    try:
        subscription.call(engine, 1)
    except Exception as failure:
        if failure is not error:
            _warn_of(failure, subscription.handler, error)


def warn_of_idle(idle: list[tuple[Subscription, int]]) -> None:
    """Say that these handlers could not be called in a run that had so many counts of their events."""
    shown = [f"{describe(each.handler)} at {event_text(each.options)}, which came {count}x" for each, count in idle[:3]]
    more = f"; and {len(idle) - len(shown)} more" if len(idle) > len(shown) else ""
    warnings.warn(
        f"The counts of this run did not reach some handlers: {'; '.join(shown)}{more}. Counts begin anew with each "
        "run. On an evaluator, ask for the trainer's: filter=lambda engine, count: trainer.state.epoch >= 5; "
        "EarlyStopping has start_after=. This is said once.",
        RuntimeWarning,
        stacklevel=4,
    )


def _warn_of(failure: Exception, handler: Handler, error: BaseException) -> None:
    with suppress(RuntimeWarning):  # where warnings are errors, it must still be `error` that is raised
        warnings.warn(
            f"Handler {describe(handler)} of EXCEPTION_RAISED failed itself with {failure!r}, "
            f"while handling {error!r}.",
            RuntimeWarning,
            stacklevel=3,
        )
