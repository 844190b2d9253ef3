"""The events of a run, and the options that choose the counts at which a handler is called.

A filtered event is a new value; the event itself is an enum member and never changes. Two events are the same only if
they are the same member: equal names in two enums, or an equal string, do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum, EnumMeta
from typing import TYPE_CHECKING, Any, TypeAlias

from dengine.checks import takes, whole_number
from dengine.naming import describe, other_keywords

if TYPE_CHECKING:
    from dengine.engine.engine import Engine

__all__ = [
    "AnyEvent",
    "EventEnum",
    "Events",
    "EventsList",
    "FilteredEvent",
    "Subscribable",
    "event_parts",
    "event_text",
    "filtered",
]

AnyEvent: TypeAlias = "Enum | str"
CountFilter: TypeAlias = "Callable[[Engine, int], bool]"
Subscribable: TypeAlias = "Enum | str | FilteredEvent | EventsList"


class _Joins:
    """Gives events the operator `a | b`: one subscription to both."""

    def __or__(self, other: Subscribable) -> EventsList:
        return EventsList((*event_parts(self), *event_parts(other)))

    def __ror__(self, other: Subscribable) -> EventsList:
        return EventsList((*event_parts(other), *event_parts(self)))


class _EventType(EnumMeta):
    """A kind of enum whose error for an unknown member lists the known ones."""

    if not TYPE_CHECKING:  # a type checker must still report members that do not exist

        def __getattr__(cls, name: str) -> Any:
            if name.startswith("_"):  # asked for while a class is made, too
                raise AttributeError(name)
            if name in cls.__members__:  # up to Python 3.11 this is how members are found
                return cls.__members__[name]
            known = list(cls.__members__)
            close = _INSTEAD.get(name) or next(iter(get_close_matches(name.upper(), known, n=1, cutoff=0.4)), None)
            hint = f" Did you mean {cls.__name__}.{close}?" if close in known else ""
            raise AttributeError(f"There is no {cls.__name__}.{name}.{hint} There is {', '.join(known)}.")


# An event of another library -> the event here.
_INSTEAD = {
    "TERMINATE": "TERMINATED",
    "TERMINATE_SINGLE_EPOCH": "EPOCH_COMPLETED",
    "INTERRUPT": "TERMINATED",
    "DATALOADER_STOP_ITERATION": "EPOCH_COMPLETED",
}
_OPTIONS = other_keywords(
    event_filter="it is called filter=, as filter(engine, count) -> bool",
    every_n="it is called every=",
)


class EventEnum(_Joins, Enum, metaclass=_EventType):
    """Base class of events: members are callable with count options, and join with `|`.

    Example:
        >>> class TrainEvents(EventEnum):
        ...     BACKWARD_COMPLETED = "backward_completed"
        >>> TrainEvents.BACKWARD_COMPLETED(every=10)
        FilteredEvent(event=<TrainEvents.BACKWARD_COMPLETED: 'backward_completed'>, every=10)
    """

    # Enum's own hash is a Python function of the name; identity is what events mean, and is three times faster.
    __hash__ = object.__hash__
    # Enum's own says, from Python 3.12 on, that a member takes what its class does.
    __signature__ = None

    @_OPTIONS
    def __call__(
        self,
        *,
        every: int | None = None,
        once: int | Iterable[int] | None = None,
        after: int | None = None,
        before: int | None = None,
        filter: CountFilter | None = None,
    ) -> FilteredEvent:
        """This event, but only at some of its counts; see `filtered`."""
        return filtered(self, every=every, once=once, after=after, before=before, filter=filter)


class Events(EventEnum):
    """The built-in events, in the order in which a run fires them.

    Counts are 1-based: iterations of the whole training for `ITERATION_*`, epochs for `EPOCH_*`, and the number of
    times it fired in this run for every other event.
    """

    STARTED = "started"
    EPOCH_STARTED = "epoch_started"
    GET_BATCH_STARTED = "get_batch_started"
    GET_BATCH_COMPLETED = "get_batch_completed"
    ITERATION_STARTED = "iteration_started"
    ITERATION_COMPLETED = "iteration_completed"
    EPOCH_COMPLETED = "epoch_completed"
    TERMINATED = "terminated"
    COMPLETED = "completed"
    EXCEPTION_RAISED = "exception_raised"


@dataclass(frozen=True, repr=False)
class FilteredEvent(_Joins):
    """An event with count options, which combine with *and*. Made by `event(...)` or `filtered(event, ...)`."""

    event: AnyEvent
    every: int | None = None
    once: tuple[int, ...] | None = None
    after: int | None = None
    before: int | None = None
    filter: CountFilter | None = None

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self.options.items()]
        return f"FilteredEvent({', '.join([f'event={self.event!r}', *shown])})"

    @property
    def options(self) -> dict[str, object]:
        """The options that were given, by name."""
        options = {name: getattr(self, name) for name in ("every", "once", "after", "before", "filter")}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class EventsList(_Joins):
    """Several events, each with its own options, for one handler. Made by `a | b`."""

    events: tuple[FilteredEvent, ...]


@_OPTIONS
def filtered(
    event: AnyEvent,
    *,
    every: int | None = None,
    once: int | Iterable[int] | None = None,
    after: int | None = None,
    before: int | None = None,
    filter: CountFilter | None = None,
) -> FilteredEvent:
    """`event`, but only at some of its counts. The options combine with *and*; the event itself is unchanged.

    Args:
        event: an enum member of any kind, or a registered string.
        every: the counts that are multiples of it.
        once: a count, or several.
        after, before: counts above `after` and below `before`, both exclusive.
        filter: called as `filter(engine, count)` on the counts that pass the rest.

    Raises:
        TypeError: there is no option, or one of the wrong type.
        ValueError: `every` or `once` below 1, `after` or `before` below 0, an empty `once`.
    """
    if not isinstance(event, (Enum, str)):
        raise TypeError(f"filtered() takes an event (an enum member or a string), but got {event!r}.")
    if every is None and once is None and after is None and before is None and filter is None:
        raise TypeError(f"{event} was called without an option: pass every=, once=, after=, before= or filter=.")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter={filter!r} must be callable as filter(engine, count) -> bool.")
    if filter is not None and not takes(filter, 2):
        raise TypeError(f"filter={filter!r} cannot be called as filter(engine, count).")
    return FilteredEvent(
        event,
        every=None if every is None else _count("every", every),
        once=None if once is None else _counts(once),
        after=None if after is None else _count("after", after, least=0),
        before=None if before is None else _count("before", before, least=0),
        filter=filter,
    )


def event_parts(events: object) -> tuple[FilteredEvent, ...]:
    """The events in anything that `on` takes, as filtered events (a bare event becomes one without options)."""
    if isinstance(events, EventsList):
        return events.events
    if isinstance(events, FilteredEvent):
        return (events,)
    if isinstance(events, (Enum, str)):
        return (FilteredEvent(events),)
    raise TypeError(
        f"{events!r} is no event: pass an enum member, a registered string, event(every=...), or events joined by |."
    )


def event_text(event: FilteredEvent) -> str:
    """The event as a user would write it: `Events.EPOCH_COMPLETED(every=5)`."""
    options = ", ".join(
        f"{name}={describe(value) if callable(value) else value!r}" for name, value in event.options.items()
    )
    return f"{event.event}({options})" if options else str(event.event)


def _count(name: str, value: object, least: int = 1) -> int:
    return whole_number(name, value, least=least, why="counts are 1-based")


def _counts(once: int | Iterable[int]) -> tuple[int, ...]:
    if isinstance(once, str) or not isinstance(once, Iterable):
        return (_count("once", once),)
    counts = sorted({_count("once", count) for count in once})
    if not counts:
        raise ValueError("once=[] would never fire: name at least one count.")
    return tuple(counts)
