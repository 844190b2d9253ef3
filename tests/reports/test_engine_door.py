"""What is given to an engine in the words of another library, or with another signature, is told at once."""

import functools
import inspect
from typing import Any

import pytest

from dengine import Engine, EventEnum, Events, filtered


class Step:
    def __call__(self, engine: Engine, batch: Any) -> Any:
        return batch

    def method(self, engine: Engine, batch: Any) -> Any:
        return batch

    def short(self, batch: Any) -> Any:
        return batch


class ShortStep:
    def __call__(self, batch: Any) -> Any:
        return batch


def one(batch: Any) -> Any:
    return batch


def three(engine: Engine, batch: Any, model: Any) -> Any:
    return batch


def keyword_only(engine: Engine, batch: Any, *, model: Any) -> Any:
    return batch


async def asynchronous(engine: Engine, batch: Any) -> Any:
    return batch


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda batch: batch, r"<lambda>\(batch\)"),
        (lambda: None, r"<lambda>\(\)"),
        (one, r"one\(batch"),
        (three, r"three\(engine.*model"),
        (keyword_only, r"keyword_only\(engine.*model"),
        (Step().short, r"Step\.short\(batch"),
        (ShortStep(), r"ShortStep\(batch"),
        (functools.partial(three), r"three\(engine"),
        (asynchronous, "async"),
        (None, "but got None"),
        (3, "but got 3"),
    ],
)
def test_a_step_that_cannot_be_called_with_engine_and_batch_is_refused_by_the_engine(function: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        Engine(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda engine, batch: batch,
        lambda *arguments: arguments[1],
        lambda engine, batch, scale=1: batch,
        Step(),
        Step().method,
        functools.partial(three, model=None),
        max,
    ],
)
def test_every_step_that_can_be_called_with_engine_and_batch_is_taken(function: Any) -> None:
    assert isinstance(Engine(function), Engine)


NAMES = {
    "add_event_handler": r"engine\.on\(event, handler\)",
    "remove_event_handler": r"remove\(\)",
    "has_event_handler": "handle",
    "attach": "add_metric",
    "event_filter": "filter=",
    "max_iters": "max_iterations=",
    "fit": r"engine\.run\(data, max_epochs=",
    "train": r"engine\.run\(data, max_epochs=",
    "validate": "evaluator",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_another_library_is_translated(name: str) -> None:
    engine = Engine(lambda engine, batch: batch)
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError, match=f"Engine has no '{name}'.*{NAMES[name]}"):
        getattr(engine, name)


def test_a_subclass_may_have_such_a_method() -> None:
    class Trainer(Engine):
        def fit(self, data: Any) -> Any:
            return self.run(data)

    assert Trainer(lambda engine, batch: batch).fit([1, 2]).iteration == 2


def test_an_unknown_name_is_an_attribute_error_as_ever() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        Engine(lambda engine, batch: batch).nonsense  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("name", "meant"), [("TERMINATE", "TERMINATED"), ("EPOCH_COMPLETE", "EPOCH_COMPLETED"), ("started", "STARTED")]
)
def test_an_event_that_there_is_not_names_the_one_that_is_meant(name: str, meant: str) -> None:
    assert not hasattr(Events, name)
    with pytest.raises(AttributeError, match=rf"no Events\.{name}\..*Events\.{meant}\?.*ITERATION_COMPLETED"):
        getattr(Events, name)


def test_events_of_ones_own_tell_what_there_is_too() -> None:
    class Mine(EventEnum):
        BACKWARD_COMPLETED = "backward"

    with pytest.raises(AttributeError, match=r"Mine\.BACKWARD_COMPLETED"):
        Mine.BACKWARD_COMPLETE  # type: ignore[attr-defined]  # noqa: B018
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


def test_keywords_of_another_library_are_translated() -> None:
    engine: Any = Engine(lambda engine, batch: batch)
    event: Any = Events.ITERATION_COMPLETED
    with pytest.raises(TypeError, match="event_filter=.*filter="):
        event(event_filter=lambda engine, count: True)
    with pytest.raises(TypeError, match="event_filter=.*filter="):
        filtered(event, event_filter=lambda engine, count: True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_iters=.*max_iterations="):
        engine.run([1], max_iters=3)
    with pytest.raises(TypeError, match="nonsense"):
        engine.run([1], nonsense=3)


def test_signatures_are_what_they_were() -> None:
    assert list(inspect.signature(Engine.run).parameters)[:4] == ["self", "data", "max_epochs", "max_iterations"]
    assert list(inspect.signature(Events.STARTED).parameters) == ["every", "once", "after", "before", "filter"]


def test_a_handler_that_is_to_be_attached_the_other_way_round_is_told_so() -> None:
    from dengine.handlers import ProgressBar

    engine: Any = Engine(lambda engine, batch: batch)
    with pytest.raises(TypeError, match=r"ProgressBar\(\.\.\.\)\.attach\(engine\)"):
        engine.on(Events.STARTED, ProgressBar())


def test_the_repr_of_an_engine_says_what_it_is_and_is_the_same_while_it_runs() -> None:
    def train_step(engine: Engine, batch: Any) -> Any:
        return batch

    class Total:
        def reset(self) -> None: ...
        def update(self, output: Any) -> None: ...
        def compute(self) -> float:
            return 1.0

    engine = Engine(train_step, distributed=False)
    engine.add_metric(Total(), "acc")
    seen: list[str] = []
    engine.on(Events.ITERATION_COMPLETED(once=3), lambda engine: seen.append(repr(engine)))
    engine.run([1, 2], max_epochs=2)
    assert seen == [repr(engine)]
    for part in ("Engine(", "train_step", "'acc'", "distributed=False"):
        assert part in repr(engine)


def test_the_repr_of_a_handle_says_what_is_attached_to_what() -> None:
    def save(engine: Engine) -> None: ...

    engine = Engine(lambda engine, batch: batch)
    handle = engine.on(Events.EPOCH_COMPLETED(every=2) | Events.COMPLETED, save)
    assert "save at Events.EPOCH_COMPLETED(every=2) | Events.COMPLETED" in repr(handle)
    handle.remove()
    assert "removed" in repr(handle)
