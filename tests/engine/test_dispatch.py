"""Attaching, calling and removing handlers; registering and firing events."""

import operator
import warnings
from collections.abc import Callable
from enum import Enum, Flag
from functools import lru_cache, partial, wraps
from typing import Any
from unittest.mock import Mock

import pytest

from dengine import Engine, EventEnum, Events, filtered


class Train(EventEnum):
    BACKWARD_STARTED = "backward_started"
    BACKWARD_COMPLETED = "backward_completed"


class Plain(Enum):
    OPTIMIZER_STEP = "optimizer_step"


@pytest.fixture
def train(engine: Engine) -> Engine:
    engine.register_events(Train)
    return engine


# -- what may be attached ----------------------------------------------------------------------------------------


class Handlers:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def method(self, engine: Engine) -> None:
        self.seen.append(engine)

    def with_default(self, engine: Engine, scale: float = 1.0) -> None:
        self.seen.append(engine)

    def variadic(self, *args: Any, **kwargs: Any) -> None:
        assert len(args) == 1
        assert not kwargs
        self.seen.append(args[0])

    def two(self, label: str, engine: Engine) -> None:
        assert label == "label"
        self.seen.append(engine)

    def keyword(self, engine: Engine, *, label: str) -> None:
        assert label == "label"
        self.seen.append(engine)

    def __call__(self, engine: Engine) -> None:
        self.seen.append(engine)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return called


class Made:
    """A class is a callable too."""

    seen: list[Any]

    def __init__(self, engine: Engine) -> None:
        self.seen.append(engine)


CALLABLES: dict[str, Callable[[Handlers], Callable[..., Any]]] = {
    "bound method": lambda handlers: handlers.method,
    "lambda": lambda handlers: lambda engine: handlers.seen.append(engine),
    "another name than engine": lambda handlers: lambda trainer: handlers.seen.append(trainer),
    "default argument": lambda handlers: handlers.with_default,
    "variadic": lambda handlers: handlers.variadic,
    "positional only": lambda handlers: eval("lambda engine, /: seen.append(engine)", {"seen": handlers.seen}),
    "partial of positional": lambda handlers: partial(handlers.two, "label"),
    "partial of keyword": lambda handlers: partial(handlers.keyword, label="label"),
    "partial of partial": lambda handlers: partial(partial(handlers.two, "label")),
    "callable object": lambda handlers: handlers,
    "builtin method": lambda handlers: handlers.seen.append,
    "decorated": lambda handlers: decorated(handlers.method),
    "cached": lambda handlers: lru_cache(handlers.method),
    "class": lambda handlers: type("Made", (Made,), {"seen": handlers.seen}),
    "mock": lambda handlers: Mock(side_effect=handlers.seen.append),
    "operator": lambda handlers: lambda engine: operator.methodcaller("append", engine)(handlers.seen),
}


@pytest.mark.parametrize("options", [{}, {"every": 1}])
@pytest.mark.parametrize("make", CALLABLES.values(), ids=CALLABLES)
def test_every_kind_of_callable_is_called_with_the_engine_alone(
    engine: Engine, make: Callable[[Handlers], Any], options: dict[str, Any]
) -> None:
    handlers = Handlers()
    engine.on(Events.STARTED(**options) if options else Events.STARTED, make(handlers))
    engine.run([1])
    assert len(handlers.seen) == 1
    assert handlers.seen[0] is engine


@pytest.mark.parametrize("make", CALLABLES.values(), ids=CALLABLES)
def test_every_kind_of_callable_may_be_for_rank_zero_only(engine: Engine, make: Callable[[Handlers], Any]) -> None:
    handlers = Handlers()
    engine.on(Events.STARTED, make(handlers), rank_zero_only=True)
    engine.run([1])
    assert handlers.seen == [engine]


@pytest.mark.parametrize("builtin", [print, repr, id])
def test_a_builtin_may_be_attached(engine: Engine, builtin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine.on(Events.STARTED, builtin)
    engine.run([1])
    assert capsys.readouterr().out == (f"{engine}\n" if builtin is print else "")


def test_what_a_handler_returns_is_ignored(engine: Engine) -> None:
    engine.on(Events.ITERATION_COMPLETED, lambda engine: True)
    assert engine.run([1, 2]).iteration == 2


def test_a_handler_with_only_a_default_argument_gets_the_engine_in_it(engine: Engine) -> None:
    """One way of calling, no guessing: what `lambda i=i: ...` was meant for must be `lambda engine, i=i: ...`."""
    seen: list[Any] = []
    engine.on(Events.STARTED, lambda i=3: seen.append(i))
    engine.run([1])
    assert seen == [engine]


# -- what is refused when it is attached -------------------------------------------------------------------------


def no_argument() -> None: ...


def two_arguments(engine: Engine, extra: int) -> None: ...


def keyword_needed(engine: Engine, *, extra: int) -> None: ...


def keywords_only(*, engine: Engine) -> None: ...


class Uncallable:
    pass


class WrongCall:
    def __call__(self, engine: Engine, extra: int) -> None: ...

    def method(self) -> None: ...


@pytest.mark.parametrize("how", ["on", "decorator", "filtered", "joined", "rank_zero_only"])
@pytest.mark.parametrize(
    ("handler", "shown"),
    [
        (no_argument, r"no_argument\(\)"),
        (two_arguments, r"two_arguments\(engine.*extra"),
        (keyword_needed, r"keyword_needed\(engine.*\*, extra"),
        (keywords_only, r"keywords_only\(\*, engine"),
        (lambda: None, r"<lambda>\(\)"),
        (partial(two_arguments, 1, 2), r"two_arguments\(\)"),  # type: ignore[arg-type]
        (WrongCall(), r"WrongCall\(engine.*extra"),
        (WrongCall().method, r"WrongCall\.method\(\)"),
        (decorated(two_arguments), r"two_arguments\(engine.*extra"),
    ],
)
def test_a_handler_that_cannot_be_called_with_the_engine_is_refused_at_once_with_its_signature(
    engine: Engine, handler: Any, shown: str, how: str
) -> None:
    attach: dict[str, Callable[[], Any]] = {
        "on": lambda: engine.on(Events.STARTED, handler),
        "decorator": lambda: engine.on(Events.STARTED)(handler),
        "filtered": lambda: engine.on(Events.STARTED(every=2), handler),
        "joined": lambda: engine.on(Events.STARTED | Events.COMPLETED, handler),
        "rank_zero_only": lambda: engine.on(Events.STARTED, handler, rank_zero_only=True),
    }
    with pytest.raises(TypeError, match=shown):
        attach[how]()
    engine.run([1])  # and it is not attached


@pytest.mark.parametrize("handler", [3, "handler", Uncallable(), [print]])
def test_what_is_not_callable_is_refused_as_a_handler(engine: Engine, handler: Any) -> None:
    with pytest.raises(TypeError, match="not callable"):
        engine.on(Events.STARTED, handler)


def test_a_type_error_inside_a_handler_is_the_handlers_own(engine: Engine) -> None:
    """Ignite guesses signatures by catching TypeError, which hides it."""

    def buggy(engine: Engine) -> None:
        calls.append(1)
        no_argument(1)  # type: ignore[call-arg]

    calls: list[int] = []
    engine.on(Events.STARTED, buggy)
    with pytest.raises(TypeError, match=r"no_argument\(\) takes 0"):
        engine.run([1])
    assert calls == [1]


@pytest.mark.parametrize("event", [None, 3, 1.5, object(), [Events.STARTED], Events, Engine])
def test_what_is_no_event_is_a_type_error(engine: Engine, event: Any) -> None:
    with pytest.raises(TypeError, match="no event"):
        engine.on(event, lambda engine: None)
    with pytest.raises(TypeError):
        engine.fire_event(event)


@pytest.mark.parametrize("priority", ["high", None])
def test_a_priority_that_is_no_number_is_refused_and_nothing_attached(engine: Engine, priority: Any) -> None:
    called: list[int] = []
    with pytest.raises(TypeError, match="priority"):
        engine.on(Events.STARTED | Events.COMPLETED, lambda engine: called.append(1), priority=priority)
    engine.run([1])
    assert called == []


def test_an_unregistered_event_among_joined_ones_attaches_to_none(engine: Engine) -> None:
    called: list[int] = []
    with pytest.raises(ValueError, match="BACKWARD_STARTED"):
        engine.on(Events.STARTED | Train.BACKWARD_STARTED, lambda engine: called.append(1))
    engine.run([1])
    assert called == []


# -- unknown events ----------------------------------------------------------------------------------------------


class Typos(EventEnum):
    ITERATION_COMPLETE = "a"
    EPOCH_FINISHED = "b"
    ZZZ = "c"


@pytest.mark.parametrize(
    ("event", "closest"),
    [
        (Typos.ITERATION_COMPLETE, "Events.ITERATION_COMPLETED"),
        ("iteration_complete", "Events.ITERATION_COMPLETED"),
        ("ITERATION_STARTD", "Events.ITERATION_STARTED"),
        ("Events.EPOCH_COMPLETD", "Events.EPOCH_COMPLETED"),
        ("backward_complete", "Train.BACKWARD_COMPLETED"),
        ("my_evnt", "my_event"),
        ("started", "Events.STARTED"),
    ],
)
def test_an_unknown_event_names_the_closest_and_lists_the_registered(train: Engine, event: Any, closest: str) -> None:
    train.register_events("my_event")
    for use in (lambda: train.on(event, lambda engine: None), lambda: train.fire_event(event)):
        with pytest.raises(ValueError, match="not registered") as raised:
            use()
        message = str(raised.value)
        assert f"Did you mean {closest}?" in message
        for each in (*Events, *Train):
            assert str(each) in message
        assert "my_event" in message
        assert "register_events" in message


def test_an_unknown_event_is_refused_by_the_decorator_before_it_decorates(engine: Engine) -> None:
    with pytest.raises(ValueError, match="not registered"):
        engine.on("nothing")


def test_an_event_that_resembles_none_is_refused_without_a_suggestion(engine: Engine) -> None:
    with pytest.raises(ValueError, match="Registered are") as raised:
        engine.fire_event(Typos.ZZZ)
    assert "Did you mean" not in str(raised.value)


def test_options_are_refused_by_fire_event(engine: Engine) -> None:
    with pytest.raises(TypeError, match="on\\(\\)"):
        engine.fire_event(Events.STARTED(every=2))  # type: ignore[arg-type]


# -- registering -------------------------------------------------------------------------------------------------


class Permissions(Flag):
    READ = 1
    WRITE = 2


@pytest.mark.parametrize(
    ("registered", "fired"),
    [
        (Train, Train.BACKWARD_STARTED),
        (Train.BACKWARD_STARTED, Train.BACKWARD_STARTED),
        (Plain, Plain.OPTIMIZER_STEP),
        (Plain.OPTIMIZER_STEP, Plain.OPTIMIZER_STEP),
        (Permissions, Permissions.READ),
        ("text", "text"),
        ("", ""),
    ],
)
def test_a_registered_event_is_accepted_by_on_and_fire_event(engine: Engine, registered: Any, fired: Any) -> None:
    engine.register_events(registered)
    called: list[Any] = []
    engine.on(fired, called.append)
    engine.on(filtered(fired, every=2), called.append)
    engine.fire_event(fired)
    assert called == [engine]
    engine.fire_event(fired)
    assert called == [engine] * 3


def test_a_single_member_does_not_register_its_siblings(engine: Engine) -> None:
    engine.register_events(Train.BACKWARD_STARTED)
    with pytest.raises(ValueError, match="BACKWARD_COMPLETED"):
        engine.fire_event(Train.BACKWARD_COMPLETED)


@pytest.mark.parametrize("wrong", [3, None, ["text"], object, Events.STARTED(every=2)])
def test_registering_something_else_is_a_type_error_and_registers_nothing(engine: Engine, wrong: Any) -> None:
    with pytest.raises(TypeError, match="register_events"):
        engine.register_events("text", wrong)
    with pytest.raises(ValueError, match="not registered"):
        engine.fire_event("text")


def test_registering_again_keeps_handlers_and_counts(train: Engine) -> None:
    called: list[int] = []
    train.on(Train.BACKWARD_STARTED(once=2), lambda engine: called.append(1))
    train.fire_event(Train.BACKWARD_STARTED)
    train.register_events(Train, Events)
    train.fire_event(Train.BACKWARD_STARTED)
    assert called == [1]


def test_a_custom_event_fired_in_the_step_has_its_own_count_in_each_run(train: Engine) -> None:
    """Ignite accepts a filter on a custom event without a counter, and fails when it fires."""

    def step(engine: Engine, batch: int) -> None:
        for _ in range(batch):
            engine.fire_event(Train.BACKWARD_STARTED)

    engine = Engine(step)
    engine.register_events(Train)
    iterations: list[int] = []
    engine.on(Train.BACKWARD_STARTED(every=3), lambda engine: iterations.append(engine.state.iteration))
    engine.run([1, 1, 4, 0, 1], max_epochs=2)
    assert iterations == [3, 3, 7, 8]  # firings 3 and 6, 9, and 12 as the third of iteration 8
    iterations.clear()
    engine.run([1, 1, 1, 1])
    assert iterations == [3]  # the count began anew


# -- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"every": 1}, {"filter": lambda engine, count: True}])
def test_higher_priority_first_and_registration_order_within_one(engine: Engine, options: dict[str, Any]) -> None:
    order: list[str] = []
    event = Events.STARTED(**options) if options else Events.STARTED
    for name, priority in [("a", 0), ("late", -10), ("b", 0), ("first", 10), ("c", 0), ("second", 10), ("mid", 5)]:
        engine.on(event, lambda engine, name=name: order.append(name), priority=priority)
    engine.run([1])
    assert order == ["first", "second", "mid", "a", "b", "c", "late"]


def test_priority_counts_between_filtered_and_plain_handlers(engine: Engine) -> None:
    order: list[str] = []
    engine.on(Events.ITERATION_COMPLETED, lambda engine: order.append("plain"))
    engine.on(Events.ITERATION_COMPLETED(every=2), lambda engine: order.append("filtered"), priority=1)
    engine.run([1, 2])
    assert order == ["plain", "filtered", "plain"]


def test_one_handler_may_be_attached_many_times_and_to_many_events(engine: Engine) -> None:
    called: list[Any] = []
    for event in (Events.STARTED, Events.STARTED, Events.COMPLETED, Events.ITERATION_COMPLETED(every=2)):
        engine.on(event, called.append)
    engine.run([1, 2])
    assert len(called) == 4


def test_one_handler_may_be_attached_to_two_engines() -> None:
    first, second = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    called: list[Any] = []
    for engine in (first, second):
        engine.on(Events.STARTED, called.append)
    second.run([1])
    first.run([1])
    assert called == [second, first]


# -- decorator and handle ----------------------------------------------------------------------------------------


def test_the_decorator_returns_the_function_unchanged(engine: Engine) -> None:
    def handler(engine: Engine) -> str:
        return "result"

    for options in ({}, {"priority": 3}, {"rank_zero_only": True}):
        assert engine.on(Events.STARTED, **options)(handler) is handler
    assert engine.on(Events.STARTED(every=2) | Events.COMPLETED)(handler) is handler


def test_decorators_may_be_stacked(engine: Engine) -> None:
    called: list[str] = []

    @engine.on(Events.STARTED)
    @engine.on(Events.COMPLETED)
    def handler(engine: Engine) -> None:
        called.append("called")

    engine.run([1])
    assert called == ["called"] * 2


def test_a_removed_handler_is_not_called_and_removing_again_does_nothing(engine: Engine) -> None:
    called: list[str] = []
    kept = engine.on(Events.ITERATION_COMPLETED, lambda engine: called.append("kept"))
    handle = engine.on(Events.ITERATION_COMPLETED, lambda engine: called.append("removed"))
    handle.remove()
    handle.remove()
    engine.run([1])
    assert called == ["kept"]
    kept.remove()
    engine.run([1])
    assert called == ["kept"]


def test_a_handle_removes_its_own_attachment_only(engine: Engine) -> None:
    called: list[Any] = []
    first = engine.on(Events.STARTED, called.append)
    engine.on(Events.STARTED, called.append)
    first.remove()
    engine.run([1])
    assert len(called) == 1


def test_a_handle_of_joined_events_removes_from_all(engine: Engine) -> None:
    called: list[Any] = []
    handle = engine.on(Events.STARTED | Events.ITERATION_COMPLETED(every=2) | Events.COMPLETED, called.append)
    engine.run([1, 2])
    assert len(called) == 3
    handle.remove()
    engine.run([1, 2])
    assert len(called) == 3


def test_a_filtered_handler_attached_after_all_others_left_is_called(engine: Engine) -> None:
    called: list[int] = []
    engine.on(Events.ITERATION_COMPLETED(once=1), lambda engine: None).remove()
    engine.on(Events.ITERATION_COMPLETED(every=3), lambda engine: called.append(engine.state.iteration))
    engine.run(range(7))
    assert called == [3, 6]


# -- attached and removed while firing ---------------------------------------------------------------------------

FIRING_OPTIONS = [{}, {"every": 1}, {"after": 0}]


def subscribed(event: EventEnum, options: dict[str, Any]) -> Any:
    return event(**options) if options else event


@pytest.mark.parametrize("own", FIRING_OPTIONS)
@pytest.mark.parametrize("added", FIRING_OPTIONS)
@pytest.mark.parametrize("priority", [-1, 0, 1])
def test_a_handler_attached_while_its_event_is_fired_is_called_from_the_next_firing_on(
    engine: Engine, own: dict[str, Any], added: dict[str, Any], priority: int
) -> None:
    """Ignite iterates over the live list, so that it runs in the same firing."""
    called: list[int] = []

    def attach(engine: Engine) -> None:
        if engine.state.iteration == 2:
            event = subscribed(Events.ITERATION_COMPLETED, added)
            engine.on(event, lambda engine: called.append(engine.state.iteration), priority=priority)

    engine.on(subscribed(Events.ITERATION_COMPLETED, own), attach)
    engine.on(Events.ITERATION_COMPLETED(every=100), lambda engine: None)
    engine.run(range(4))
    assert called == [3, 4]


@pytest.mark.parametrize("own", FIRING_OPTIONS)
@pytest.mark.parametrize("removed", FIRING_OPTIONS)
def test_a_handler_removed_while_its_event_is_fired_is_called_this_once_more(
    engine: Engine, own: dict[str, Any], removed: dict[str, Any]
) -> None:
    called: list[int] = []
    handle: Any
    engine.on(
        subscribed(Events.ITERATION_COMPLETED, own),
        lambda engine: handle.remove() if engine.state.iteration == 2 else None,
        priority=1,
    )
    event = subscribed(Events.ITERATION_COMPLETED, removed)
    handle = engine.on(event, lambda engine: called.append(engine.state.iteration))
    engine.run(range(4))
    assert called == [1, 2]


def test_a_handler_may_remove_itself(engine: Engine) -> None:
    called: list[str] = []

    def once(engine: Engine) -> None:
        called.append("once")
        handle.remove()

    handle = engine.on(Events.ITERATION_COMPLETED, once)
    engine.on(Events.ITERATION_COMPLETED, lambda engine: called.append("always"))
    engine.run(range(2))
    assert called == ["once", "always", "always"]


def test_a_handler_attached_in_an_earlier_event_of_the_iteration_is_called_in_it(engine: Engine) -> None:
    called: list[int] = []
    attach: list[Any] = []
    for event, at in [(Events.ITERATION_STARTED, 2), (Events.GET_BATCH_STARTED, 2), (Events.GET_BATCH_COMPLETED, 2)]:
        engine.on(
            event(once=at),
            lambda engine: attach.append(
                engine.on(Events.ITERATION_COMPLETED, lambda engine: called.append(engine.state.iteration))
            ),
        )
    engine.run(range(3))
    assert called == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("at", range(1, 8))
def test_a_filtered_handler_attached_in_the_middle_of_a_run_keeps_to_the_counts_of_the_run(
    engine: Engine, at: int
) -> None:
    called: list[int] = []

    def attach(engine: Engine) -> None:
        engine.on(Events.ITERATION_COMPLETED(every=3), lambda engine: called.append(engine.state.iteration))

    engine.on(Events.ITERATION_COMPLETED(once=at), attach)
    engine.run(range(9))
    assert called == [count for count in (3, 6, 9) if count > at]


def test_a_handler_that_fires_another_event_runs_its_handlers_in_between(train: Engine) -> None:
    order: list[str] = []
    train.on(Train.BACKWARD_STARTED, lambda engine: order.append("inner"))
    train.on(Events.STARTED, lambda engine: engine.fire_event(Train.BACKWARD_STARTED))
    train.on(Events.STARTED, lambda engine: order.append("outer"))
    train.run([1])
    assert order == ["inner", "outer"]


def test_an_exception_of_a_handler_keeps_the_later_handlers_of_its_firing_from_running(engine: Engine) -> None:
    called: list[str] = []

    def fail(engine: Engine) -> None:
        raise KeyError("mine")

    engine.on(Events.STARTED, lambda engine: called.append("before"))
    engine.on(Events.STARTED, fail)
    engine.on(Events.STARTED, lambda engine: called.append("after"))
    with pytest.raises(KeyError, match="mine"):
        engine.run([1])
    assert called == ["before"]


# -- events fired by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "inside"),
    [
        (Events.ITERATION_COMPLETED, Events.ITERATION_STARTED),
        (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED),
        (Events.EPOCH_COMPLETED, Events.ITERATION_STARTED),
        (Events.EPOCH_STARTED, Events.ITERATION_STARTED),
    ],
)
def test_a_built_in_event_fired_by_hand_takes_no_call_away_from_the_loop(
    engine: Engine, event: EventEnum, inside: EventEnum
) -> None:
    def counts_of(*, is_fired_by_hand: bool) -> list[int]:
        engine = Engine(lambda engine, batch: None)
        by_loop: list[int] = []
        by_hand: list[bool] = []
        if is_fired_by_hand:

            def fire(engine: Engine) -> None:
                by_hand.append(True)
                engine.fire_event(event)
                by_hand.pop()

            engine.on(inside, fire)
        engine.on(event(every=2), lambda engine: None if by_hand else by_loop.append(engine.state.iteration))
        engine.run(range(4), max_epochs=4)
        return by_loop

    assert counts_of(is_fired_by_hand=True) == counts_of(is_fired_by_hand=False) != []


def test_firing_names_the_event_whose_handlers_run_and_is_restored(train: Engine) -> None:
    firing: list[Any] = []
    for event in Events:
        train.on(event, lambda engine: firing.append(engine.firing))
    train.on(Train.BACKWARD_STARTED, lambda engine: firing.append(engine.firing))
    train.on(Events.STARTED, lambda engine: engine.fire_event(Train.BACKWARD_STARTED), priority=1)
    train.on(Events.COMPLETED, lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run([1], max_epochs=1)
    assert firing == [
        Train.BACKWARD_STARTED,
        Events.STARTED,
        Events.EPOCH_STARTED,
        Events.GET_BATCH_STARTED,
        Events.GET_BATCH_COMPLETED,
        Events.ITERATION_STARTED,
        Events.ITERATION_COMPLETED,
        Events.EPOCH_COMPLETED,
        Events.COMPLETED,
        Events.EXCEPTION_RAISED,
    ]
    assert train.firing is None


def test_rank_zero_only_refuses_a_collective_inside(engine: Engine) -> None:
    from dengine import RankZeroCollectiveError, distributed

    engine.on(Events.STARTED, lambda engine: distributed.barrier("never"), rank_zero_only=True)
    with pytest.raises(RankZeroCollectiveError):
        engine.run([1])


def test_attaching_and_running_warns_of_nothing(engine: Engine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for event in Events:
            engine.on(event(every=1), lambda engine: None)
        engine.run([1, 2], max_epochs=2)
