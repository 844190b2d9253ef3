"""A handler whose counts a run cannot reach is told of, in the first run that could never call it."""

import warnings
from typing import Any

import pytest

from dengine import Engine, EventEnum, Events


def nothing(engine: Engine, batch: Any) -> Any:
    return batch


def save(engine: Engine) -> None:
    pass


def warned(engine: Engine, data: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.run(data, **options)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("event", "count"),
    [
        (Events.EPOCH_COMPLETED(after=3), 1),
        (Events.EPOCH_COMPLETED(every=2), 1),
        (Events.EPOCH_COMPLETED(once=[5, 7]), 1),
        (Events.EPOCH_STARTED(every=2), 1),
        (Events.ITERATION_COMPLETED(every=100), 4),
        (Events.ITERATION_STARTED(after=4), 4),
        (Events.GET_BATCH_COMPLETED(every=5), 4),
        (Events.COMPLETED(every=2), 1),
        (Events.STARTED(after=1), 1),
    ],
)
def test_an_evaluator_says_in_its_first_run_which_handler_it_can_never_call(event: Any, count: int) -> None:
    evaluator = Engine(nothing)
    evaluator.on(event, save)
    (told,) = warned(evaluator, range(4))
    assert f"save at {event.event}(" in told
    assert f"came {count}x" in told
    assert "begin anew with each run" in told
    assert warned(evaluator, range(4)) == []  # once is enough


@pytest.mark.parametrize(
    "event",
    [
        Events.EPOCH_COMPLETED,
        Events.EPOCH_COMPLETED(every=1),
        Events.EPOCH_COMPLETED(before=3),
        Events.ITERATION_COMPLETED(every=4),
        Events.ITERATION_COMPLETED(after=3),
        Events.EPOCH_COMPLETED(filter=lambda engine, count: False),
        Events.TERMINATED(every=2),
        Events.EXCEPTION_RAISED(every=2),
    ],
)
def test_what_a_run_can_call_is_not_told_of(event: Any) -> None:
    evaluator = Engine(nothing)
    evaluator.on(event, save)
    assert warned(evaluator, range(4)) == []


def test_a_run_that_is_left_early_or_gone_on_with_says_nothing() -> None:
    trainer = Engine(nothing)
    trainer.on(Events.EPOCH_COMPLETED(every=3), save)
    handle = trainer.on(Events.ITERATION_COMPLETED(once=5), lambda engine: engine.terminate())
    assert warned(trainer, range(4), max_epochs=3) == []
    handle.remove()
    trainer.load_state_dict(trainer.state_dict())
    assert warned(trainer, range(4), max_epochs=2) == []


def test_many_of_them_are_one_warning() -> None:
    evaluator = Engine(nothing)
    for _ in range(9):
        evaluator.on(Events.EPOCH_COMPLETED(every=2), save)
    (told,) = warned(evaluator, range(4))
    assert told.count("save at") == 3
    assert "and 6 more" in told


def test_an_event_of_ones_own_is_told_of_too() -> None:
    class Mine(EventEnum):
        HALF = "half"

    evaluator = Engine(nothing)
    evaluator.register_events(Mine)
    evaluator.on(Events.ITERATION_COMPLETED(every=2), lambda engine: engine.fire_event(Mine.HALF))
    evaluator.on(Mine.HALF(every=10), save)
    (told,) = warned(evaluator, range(4))
    assert "Mine.HALF(every=10)" in told


def test_data_without_a_length_are_told_of_too() -> None:
    evaluator = Engine(nothing)
    evaluator.on(Events.ITERATION_COMPLETED(every=100), save)
    (told,) = warned(evaluator, iter(range(7)))
    assert "came 7x" in told
