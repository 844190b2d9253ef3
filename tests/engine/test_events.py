"""Events as values: identity, options, and what is refused when an event is made."""

import pickle
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine import Engine, EventEnum, Events, filtered
from dengine.engine import EventsList, FilteredEvent


class Mine(EventEnum):
    STEP = "step"
    OTHER = "other"


class Plain(Enum):
    STEP = "step"


MAKERS: dict[str, Callable[..., FilteredEvent]] = {
    "built-in": Events.ITERATION_COMPLETED,
    "epoch": Events.EPOCH_COMPLETED,
    "rare": Events.TERMINATED,
    "custom": Mine.STEP,
    "plain enum": partial(filtered, Plain.STEP),
    "string": partial(filtered, "step"),
}


def counts_fired(options: dict[str, Any], num_counts: int, event: Any = Mine.STEP) -> list[int]:
    """At which of the first `num_counts` firings of an event a handler with `options` is called."""
    engine = Engine(lambda engine, batch: None)
    engine.register_events(Mine, Plain, "step")
    fired: list[int] = []
    count = 0
    engine.on(filtered(event, **options), lambda engine: fired.append(count))
    while count < num_counts:
        count += 1  # read by the handler
        engine.fire_event(event)
    return fired


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("option", ["every", "once"])
@pytest.mark.parametrize("value", [0, -1, -100])
def test_a_count_below_one_is_a_value_error_that_names_option_and_value(
    make: Callable[..., Any], option: str, value: int
) -> None:
    with pytest.raises(ValueError, match=f"{option}={value}.*at least 1"):
        make(**{option: value})


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("option", ["every", "once", "after", "before"])
@pytest.mark.parametrize("value", ["a", "1", 1.0, 2.5, True, False, object(), float("nan")])
def test_an_option_that_is_no_whole_number_is_a_type_error_that_names_it(
    make: Callable[..., Any], option: str, value: Any
) -> None:
    with pytest.raises(TypeError, match=f"{option}="):
        make(**{option: value})


@pytest.mark.parametrize("option", ["after", "before"])
def test_a_negative_bound_is_a_value_error(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=-1"):
        options: dict[str, Any] = {option: -1}
        Events.ITERATION_COMPLETED(**options)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_option_at_all_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="every="):
        make()


@pytest.mark.parametrize("value", [[], (), set(), [0], [1, -1], [3, 0]])
def test_once_without_a_count_or_with_one_below_one_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match="once="):
        Events.ITERATION_COMPLETED(once=value)


@pytest.mark.parametrize("value", [["a"], [1.5], [1, None], [True], "12"])
def test_once_with_something_else_than_counts_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="once="):
        Events.ITERATION_COMPLETED(once=value)


@pytest.mark.parametrize("value", [3, "every", [lambda engine, count: True]])
def test_a_filter_that_is_not_callable_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="filter="):
        Events.ITERATION_COMPLETED(filter=value)


@pytest.mark.parametrize(
    "function", [lambda: True, lambda count: True, lambda a, b, c: True, lambda *, engine, count: True]
)
def test_a_filter_with_the_wrong_signature_is_a_type_error_at_once(function: Any) -> None:
    with pytest.raises(TypeError, match=r"lambda.*filter\(engine, count\)"):
        Events.ITERATION_COMPLETED(filter=function)


def test_options_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        Events.ITERATION_COMPLETED(100)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="evry"):
        Events.ITERATION_COMPLETED(evry=100)  # type: ignore[call-arg]


@pytest.mark.parametrize("event", [None, 3, Events.STARTED(every=2), Events.STARTED | Mine.STEP])
def test_filtered_takes_a_bare_event_only(event: Any) -> None:
    with pytest.raises(TypeError, match="filtered"):
        filtered(event, every=2)


# -- identity ----------------------------------------------------------------------------------------------------


class Namesake(EventEnum):
    """Names and values of the built-in events."""

    STARTED = "started"
    ITERATION_COMPLETED = "iteration_completed"


class StrMixin(str, Enum):
    STARTED = "started"


class OtherStrMixin(str, Enum):
    STARTED = "started"


class StrEvents(str, EventEnum):
    STARTED = "started"


class IntMixin(int, Enum):
    STARTED = 1


class OtherIntMixin(int, Enum):
    STARTED = 1


NAMESAKES = [
    Events.STARTED,
    Namesake.STARTED,
    StrMixin.STARTED,
    OtherStrMixin.STARTED,
    StrEvents.STARTED,
    IntMixin.STARTED,
    OtherIntMixin.STARTED,
    "started",
    "STARTED",
    "Events.STARTED",
]


@pytest.mark.parametrize("fired", NAMESAKES, ids=lambda event: f"{type(event).__name__}-{event}")
def test_events_of_equal_name_or_value_never_meet(engine: Engine, fired: Any) -> None:
    engine.register_events(Namesake, StrMixin, OtherStrMixin, StrEvents, IntMixin, OtherIntMixin)
    engine.register_events("started", "STARTED", "Events.STARTED")
    called: list[Any] = []
    event: Any
    for event in NAMESAKES:
        engine.on(event, lambda engine, event=event: called.append(event))
    engine.fire_event(fired)
    assert len(called) == 1
    assert called[0] is fired


def test_the_run_fires_no_namesake_of_a_built_in_event(engine: Engine) -> None:
    engine.register_events(Namesake, "iteration_completed")
    called: list[str] = []
    for event in (Namesake.STARTED, Namesake.ITERATION_COMPLETED, "iteration_completed"):
        engine.on(event, lambda engine: called.append("namesake"))
    engine.run([1, 2])
    assert called == []


@pytest.mark.parametrize("event", [event for event in NAMESAKES if event is not Events.STARTED])
def test_a_namesake_of_a_built_in_event_is_not_registered_by_itself(engine: Engine, event: Any) -> None:
    with pytest.raises(ValueError, match="not registered"):
        engine.on(event, lambda engine: None)


def test_a_custom_event_is_registered_with_one_engine_only() -> None:
    first, second = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    first.register_events(Mine)
    with pytest.raises(ValueError, match="not registered"):
        second.fire_event(Mine.STEP)


def test_two_members_are_equal_only_where_they_are_the_same() -> None:
    assert Events.STARTED == Events.STARTED
    assert Events.STARTED != Namesake.STARTED
    assert Events.STARTED != "started"
    assert Events.STARTED != "STARTED"
    assert len({Events.STARTED, Namesake.STARTED, Events.STARTED}) == 2


def test_an_event_that_was_pickled_is_the_same_event() -> None:
    assert pickle.loads(pickle.dumps(Events.STARTED)) is Events.STARTED
    restored = pickle.loads(pickle.dumps(Events.ITERATION_COMPLETED(every=3)))
    assert restored == Events.ITERATION_COMPLETED(every=3)
    assert restored.event is Events.ITERATION_COMPLETED


def test_there_are_the_ten_built_in_events_in_the_order_of_a_run() -> None:
    assert [event.name for event in Events] == [
        "STARTED",
        "EPOCH_STARTED",
        "GET_BATCH_STARTED",
        "GET_BATCH_COMPLETED",
        "ITERATION_STARTED",
        "ITERATION_COMPLETED",
        "EPOCH_COMPLETED",
        "TERMINATED",
        "COMPLETED",
        "EXCEPTION_RAISED",
    ]


# -- making one changes nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Mine.STEP])
def test_making_a_filtered_event_changes_nothing_about_the_event(engine: Engine, event: EventEnum) -> None:
    engine.register_events(Mine)
    before = (dict(vars(event)), hash(event), repr(event))
    event(every=1000)
    event(once=[1000])
    filtered(event, after=1000)
    assert (dict(vars(event)), hash(event), repr(event)) == before
    called = []
    engine.on(event, lambda engine: called.append(1))
    engine.fire_event(event)
    assert called == [1]


def test_joining_changes_neither_side() -> None:
    """Ignite's `EventsList.__or__` changes its left side."""
    left = Events.STARTED | Events.COMPLETED
    before = left.events
    longer = left | Mine.STEP
    assert left.events == before
    assert [part.event for part in longer.events] == [Events.STARTED, Events.COMPLETED, Mine.STEP]


def test_a_filtered_event_says_what_it_is() -> None:
    shown = repr(Events.ITERATION_COMPLETED(every=3, after=10))
    assert "ITERATION_COMPLETED" in shown
    assert "every=3" in shown
    assert "after=10" in shown
    assert "once" not in shown


def test_a_filtered_event_is_a_value() -> None:
    assert Events.STARTED(once=[2, 1, 2]) == Events.STARTED(once=[1, 2])
    with pytest.raises(AttributeError):
        Events.STARTED(every=2).every = 3


# -- which counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "num_calls"),
    [
        ({"every": 1}, 500),
        ({"every": 7}, 71),
        ({"every": 500}, 1),
        ({"every": 501}, 0),
        ({"before": 300}, 299),
        ({"before": 1}, 0),
        ({"before": 0}, 0),
        ({"after": 300}, 200),
        ({"after": 0}, 500),
        ({"after": 500}, 0),
        ({"after": 100, "before": 300}, 199),
        ({"every": 5, "after": 8, "before": 25}, 3),  # 10, 15, 20: options combine with and
        ({"once": 12}, 1),
        ({"once": 501}, 0),
        ({"once": [1, 5]}, 2),
        ({"once": [1, 4, 8], "every": 4}, 2),
        ({"once": [10, 20, 30], "after": 10, "before": 30}, 1),
        ({"filter": lambda engine, count: count in (3, 400)}, 2),
        ({"filter": lambda engine, count: count < 20, "every": 5}, 3),
        ({"filter": lambda engine, count: None}, 0),
        ({"every": np.int64(100)}, 5),
        ({"once": np.array([7, 9])}, 2),
        ({"once": range(10, 13)}, 3),
        ({"once": (count for count in (2, 3))}, 2),
    ],
)
def test_options_call_as_often_in_500_counts_as_known_by_hand(options: dict[str, Any], num_calls: int) -> None:
    assert len(counts_fired(options, 500)) == num_calls


def oracle(options: dict[str, Any], num_counts: int) -> list[int]:
    once = options.get("once")
    wanted = once if isinstance(once, (list, type(None))) else [once]
    return [
        count
        for count in range(1, num_counts + 1)
        if count % options.get("every", 1) == 0
        and (wanted is None or count in wanted)
        and count > options.get("after", 0)
        and count < options.get("before", num_counts + 1)
        and ("filter" not in options or options["filter"](None, count))
    ]


COUNTS = st.integers(1, 520)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "every": st.integers(1, 60),
        "once": COUNTS | st.lists(COUNTS, min_size=1, max_size=40),
        "after": st.integers(0, 520),
        "before": st.integers(0, 520),
        "filter": st.sampled_from([lambda engine, count: count % 3 != 1, lambda engine, count: count > 250]),
    },
).filter(bool)


@settings(max_examples=150, deadline=None)
@given(options=OPTIONS, event=st.sampled_from([Mine.STEP, Plain.STEP, "step", Events.COMPLETED]))
def test_options_combine_with_and_for_events_counted_by_firing(options: dict[str, Any], event: Any) -> None:
    assert counts_fired(options, 500, event) == oracle(options, 500)


PER_ITERATION = [
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
]


@settings(max_examples=100, deadline=None)
@given(several=st.lists(st.tuples(st.sampled_from(PER_ITERATION), OPTIONS), min_size=1, max_size=4))
def test_options_combine_with_and_inside_the_loop_for_several_handlers(
    several: list[tuple[EventEnum, dict[str, Any]]],
) -> None:
    """Within the loop a channel knows the next count at which anybody is due: handlers must not hide each other."""
    engine = Engine(lambda engine, batch: None)
    fired: list[list[int]] = [[] for _ in several]
    for place, (event, options) in enumerate(several):
        # Of GET_BATCH_* the iteration is that of the batch before.
        early = 1 if event in PER_ITERATION[:2] else 0
        engine.on(
            event(**options),
            lambda engine, place=place, early=early: fired[place].append(engine.state.iteration + early),
        )
    engine.run(range(100), max_epochs=5)
    assert fired == [oracle(options, 500) for _, options in several]


@settings(max_examples=50, deadline=None)
@given(options=OPTIONS, event=st.sampled_from([Events.EPOCH_STARTED, Events.EPOCH_COMPLETED]))
def test_options_combine_with_and_for_epochs(options: dict[str, Any], event: EventEnum) -> None:
    engine = Engine(lambda engine, batch: None)
    fired: list[int] = []
    engine.on(event(**options), lambda engine: fired.append(engine.state.epoch + 1))
    engine.run([0], max_epochs=500)
    assert fired == oracle(options, 500)


def test_a_filter_is_asked_with_engine_and_count_only_where_the_other_options_allow(engine: Engine) -> None:
    asked: list[tuple[Any, int]] = []
    engine.on(
        Events.ITERATION_COMPLETED(
            every=2, after=2, filter=lambda engine, count: asked.append((engine, count)) or True
        ),
        lambda engine: None,
    )
    engine.run(range(6))
    assert asked == [(engine, 4), (engine, 6)]


def test_the_documented_examples_of_counts(engine: Engine) -> None:
    epochs: list[int] = []
    once: list[int] = []
    engine.on(Events.EPOCH_COMPLETED(every=5), lambda engine: epochs.append(engine.state.epoch))
    engine.on(Events.ITERATION_COMPLETED(once=[10, 100]), lambda engine: once.append(engine.state.iteration))
    engine.run(range(15), max_epochs=10)
    assert epochs == [4, 9]
    assert once == [10, 100]


# -- joined events -----------------------------------------------------------------------------------------------


def calls(engine: Engine, event: Any, fire: Iterable[Any]) -> int:
    called: list[int] = []
    handle = engine.on(event, lambda engine: called.append(1))
    for each in fire:
        engine.fire_event(each)
    handle.remove()
    return len(called)


@pytest.mark.parametrize(
    ("joined", "num_calls"),
    [
        (Mine.STEP | Mine.OTHER(every=2), 4 + 2),
        (Mine.STEP(every=2) | Mine.OTHER, 2 + 4),
        (Mine.STEP(once=1) | Mine.OTHER(once=[1, 4]), 1 + 2),
        (Mine.STEP | "text", 4 + 4),
        ("text" | Mine.STEP(every=4), 1 + 4),
        (Mine.STEP | Plain.STEP, 4 + 4),
        (Plain.STEP | Mine.STEP, 4 + 4),
        (filtered(Plain.STEP, every=3) | filtered("text", every=2), 1 + 2),
        ((Mine.STEP | Mine.OTHER) | (Plain.STEP | filtered("text", once=2)), 4 + 4 + 4 + 1),
    ],
)
def test_joined_events_call_for_each_by_its_own_count(engine: Engine, joined: EventsList, num_calls: int) -> None:
    engine.register_events(Mine, Plain, "text")
    assert calls(engine, joined, [Mine.STEP, Mine.OTHER, Plain.STEP, "text"] * 4) == num_calls


def test_joining_with_something_that_is_no_event_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no event"):
        Events.STARTED | 3
