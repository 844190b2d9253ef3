"""What handlers read on `engine.state`, and what a checkpoint of it holds."""

import copy
import io
import json
import time
from typing import Any

import numpy as np
import pytest
import torch

from dengine import Engine, Events, State

PLAIN = (bool, int, float, str, list, dict, type(None))


def assert_plain(value: Any) -> None:
    assert type(value) in PLAIN, f"{value!r} is a {type(value)}"
    if isinstance(value, dict):
        for key, inner in value.items():
            assert type(key) is str
            assert_plain(inner)
    if isinstance(value, list):
        for inner in value:
            assert_plain(inner)


def round_trip(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


# -- attributes --------------------------------------------------------------------------------------------------


def test_a_new_engine_stands_at_zero(engine: Engine) -> None:
    state = engine.state
    assert isinstance(state, State)
    assert (state.epoch, state.iteration, state.epoch_iteration) == (0, 0, 0)
    assert state.max_epochs is state.epoch_length is state.output is state.batch is state.dataloader is None
    assert state.metrics == {}
    assert state.times == {}


def test_run_returns_the_state(engine: Engine) -> None:
    assert engine.run([1]) is engine.state


def test_the_state_in_every_event_of_two_epochs_of_two_batches(engine: Engine) -> None:
    rows: list[tuple[Any, ...]] = []
    for event in Events:
        engine.on(
            event,
            lambda engine, name=event.name: rows.append(
                (
                    name,
                    engine.state.epoch,
                    engine.state.iteration,
                    engine.state.epoch_iteration,
                    engine.state.batch,
                    engine.state.output,
                )
            ),
        )
    engine.run(["a", "b"], max_epochs=2)
    assert rows == [
        ("STARTED", 0, 0, 0, None, None),
        ("EPOCH_STARTED", 0, 0, 0, None, None),
        ("GET_BATCH_STARTED", 0, 0, 0, None, None),
        ("GET_BATCH_COMPLETED", 0, 0, 0, "a", None),
        ("ITERATION_STARTED", 0, 1, 1, "a", None),
        ("ITERATION_COMPLETED", 0, 1, 1, "a", "a"),
        ("GET_BATCH_STARTED", 0, 1, 1, "a", "a"),
        ("GET_BATCH_COMPLETED", 0, 1, 1, "b", "a"),
        ("ITERATION_STARTED", 0, 2, 2, "b", "a"),
        ("ITERATION_COMPLETED", 0, 2, 2, "b", "b"),
        ("EPOCH_COMPLETED", 0, 2, 2, None, "b"),
        ("EPOCH_STARTED", 1, 2, 0, None, "b"),
        ("GET_BATCH_STARTED", 1, 2, 0, None, "b"),
        ("GET_BATCH_COMPLETED", 1, 2, 0, "a", "b"),
        ("ITERATION_STARTED", 1, 3, 1, "a", "b"),
        ("ITERATION_COMPLETED", 1, 3, 1, "a", "a"),
        ("GET_BATCH_STARTED", 1, 3, 1, "a", "a"),
        ("GET_BATCH_COMPLETED", 1, 3, 1, "b", "a"),
        ("ITERATION_STARTED", 1, 4, 2, "b", "a"),
        ("ITERATION_COMPLETED", 1, 4, 2, "b", "b"),
        ("EPOCH_COMPLETED", 1, 4, 2, None, "b"),
        ("COMPLETED", 1, 4, 2, None, "b"),
    ]
    assert (engine.state.epoch, engine.state.iteration, engine.state.epoch_iteration) == (1, 4, 2)


def test_inside_the_step_the_iteration_is_the_one_under_way() -> None:
    seen: list[tuple[int, int, int, Any]] = []

    def step(engine: Engine, batch: Any) -> None:
        state = engine.state
        seen.append((state.epoch, state.iteration, state.epoch_iteration, state.batch))

    Engine(step).run("ab", max_epochs=2)
    assert seen == [(0, 1, 1, "a"), (0, 2, 2, "b"), (1, 3, 1, "a"), (1, 4, 2, "b")]


def test_the_last_output_is_still_there_after_the_run(engine: Engine) -> None:
    assert engine.run([1, 2, 3], max_epochs=2).output == 3


def test_a_new_run_does_not_begin_with_the_old_output(engine: Engine) -> None:
    engine.run([1])
    outputs: list[Any] = []
    engine.on(Events.STARTED, lambda engine: outputs.append(engine.state.output))
    engine.run([2])
    assert outputs == [None]


def test_a_handler_may_give_the_step_another_batch(engine: Engine) -> None:
    @engine.on(Events.GET_BATCH_COMPLETED)
    def double(engine: Engine) -> None:
        engine.state.batch *= 2

    outputs: list[int] = []
    engine.on(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    engine.run([1, 2, 3])
    assert outputs == [2, 4, 6]


@pytest.mark.parametrize("data", [[1, 2], (1, 2), range(2), {1, 2}, iter([1, 2])])
def test_the_dataloader_is_the_data_as_given(engine: Engine, data: Any) -> None:
    seen: list[Any] = []
    engine.on(Events.STARTED, lambda engine: seen.append(engine.state.dataloader))
    engine.run(data)
    assert seen[0] is data


def test_max_epochs_and_epoch_length_are_as_given_or_found(engine: Engine) -> None:
    state = engine.run([1, 2, 3], max_epochs=2)
    assert (state.max_epochs, state.epoch_length) == (2, 3)
    engine.run([1, 2, 3], max_epochs=4, epoch_length=2)
    assert (state.max_epochs, state.epoch_length) == (4, 2)
    engine.run([1, 2, 3], max_epochs=None, max_iterations=2)
    assert (state.max_epochs, state.epoch_length) == (None, 3)


def test_the_epoch_length_is_unknown_until_the_first_epoch_of_data_without_a_length_has_ended(engine: Engine) -> None:
    class Unsized:
        def __iter__(self) -> Any:
            return iter([1, 2, 3])

    lengths: list[int | None] = []
    for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED):
        engine.on(event, lambda engine: lengths.append(engine.state.epoch_length))
    engine.run(Unsized(), max_epochs=2)
    assert lengths == [None, 3, 3, 3]


# -- the batch outlives nothing ----------------------------------------------------------------------------------


class Batch:
    alive = 0

    def __init__(self) -> None:
        Batch.alive += 1

    def __del__(self) -> None:
        Batch.alive -= 1


class Batches:
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return (Batch() for _ in range(self.length))


@pytest.mark.parametrize("end", ["data", "length", "terminate", "terminate_epoch", "max_iterations"])
def test_no_batch_outlives_its_epoch(end: str) -> None:
    engine = Engine(lambda engine, batch: None)
    alive: list[tuple[str, int]] = []
    for event in (Events.EPOCH_COMPLETED, Events.TERMINATED, Events.COMPLETED):
        engine.on(event, lambda engine, name=event.name: alive.append((name, Batch.alive)))
    if end in ("terminate", "terminate_epoch"):
        engine.on(Events.ITERATION_COMPLETED(once=2), lambda engine: getattr(engine, end)())
    engine.run(
        Batches(3),
        epoch_length=2 if end == "length" else None,
        max_iterations=2 if end == "max_iterations" else None,
    )
    assert alive
    assert {count for _, count in alive} == {0}
    assert Batch.alive == 0
    assert engine.state.batch is None


@pytest.mark.parametrize("event", [Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED])
def test_after_an_exception_the_batch_goes_with_the_exception(event: Any) -> None:
    """Who catches an out-of-memory error to try again must not find the memory held by the engine."""
    engine = Engine(lambda engine, batch: None)
    batches: list[Any] = []
    engine.on(Events.EXCEPTION_RAISED, lambda engine: batches.append(type(engine.state.batch)))
    engine.on(event, lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        engine.run(Batches(3))
    assert batches == [Batch]  # handlers may look at it
    assert engine.state.batch is None
    del raised
    engine.state.exception = None  # its traceback holds the frames; the next run lets go of it as well
    assert Batch.alive == 0


# -- times -------------------------------------------------------------------------------------------------------


def test_times_are_seconds_of_the_last_finished_epoch_and_of_the_run() -> None:
    engine = Engine(lambda engine, batch: time.sleep(0.02))
    epoch_times: list[float] = []
    engine.on(Events.EPOCH_COMPLETED, lambda engine: epoch_times.append(engine.state.times["epoch"]))
    before_s = time.perf_counter()
    state = engine.run(range(2), max_epochs=2)
    elapsed_s = time.perf_counter() - before_s
    assert len(epoch_times) == 2
    assert all(seconds >= 0.04 for seconds in epoch_times)
    assert state.times["epoch"] == epoch_times[-1]
    assert sum(epoch_times) <= state.times["run"] <= elapsed_s


def test_the_time_of_the_run_is_there_for_handlers_of_completed_and_terminated(engine: Engine) -> None:
    seen: list[float] = []
    engine.on(Events.COMPLETED | Events.TERMINATED, lambda engine: seen.append(engine.state.times["run"]))
    engine.on(Events.EPOCH_STARTED, lambda engine: time.sleep(0.01))
    engine.on(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
    engine.run([1])
    assert len(seen) == 2
    assert all(seconds >= 0.01 for seconds in seen)


def test_times_are_those_of_the_last_run(engine: Engine) -> None:
    engine.run([1])
    engine.on(Events.EPOCH_STARTED, lambda engine: engine.terminate())
    assert "epoch" not in engine.run([1]).times


def test_the_time_of_a_run_that_raised_is_there(engine: Engine) -> None:
    engine.on(Events.STARTED, lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run([1])
    assert engine.state.times["run"] >= 0.0


def test_dicts_kept_from_one_run_are_not_changed_by_the_next(engine: Engine) -> None:
    state = engine.run([1])
    metrics, times = state.metrics, state.times
    kept = dict(times)
    engine.run([1, 2, 3])
    assert times == kept
    assert state.times is not times
    assert state.metrics is not metrics


# -- attributes of one's own -------------------------------------------------------------------------------------


def test_own_attributes_survive_runs(engine: Engine) -> None:
    engine.state.best_acc = 0.5
    engine.run([1])
    engine.run([1])
    assert engine.state.best_acc == 0.5


def test_a_typo_is_an_attribute_error(engine: Engine) -> None:
    with pytest.raises(AttributeError):
        engine.state.itertion  # noqa: B018


def test_two_engines_share_no_state() -> None:
    """Ignite's `State.event_to_attr` is one dict of the class."""
    first, second = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    first.state.persist("mine")
    first.state.mine = 1
    first.register_events("mine")
    assert not hasattr(second.state, "mine")
    assert second.state_dict()["persisted"] == {}
    assert first.state.metrics is not second.state.metrics


def test_a_persisted_attribute_is_part_of_the_state_dict(engine: Engine) -> None:
    engine.state.persist("best_acc", "history")
    engine.state.best_acc = 0.75
    engine.state.history = [{"loss": 1.5, "tags": ["a", None, True]}]
    restored = Engine(lambda engine, batch: None)
    restored.load_state_dict(round_trip(engine.state_dict()))
    assert restored.state.best_acc == 0.75
    assert restored.state.history == [{"loss": 1.5, "tags": ["a", None, True]}]
    # ... and is persisted on, without another persist().
    restored.state.best_acc = 0.8
    third = Engine(lambda engine, batch: None)
    third.load_state_dict(restored.state_dict())
    assert third.state.best_acc == 0.8


def test_an_attribute_that_is_not_persisted_is_no_part_of_the_state_dict(engine: Engine) -> None:
    engine.state.not_mine = torch.zeros(3)
    assert "not_mine" not in str(engine.state_dict())


def test_persist_may_come_before_the_attribute_and_twice(engine: Engine) -> None:
    engine.state.persist("best_acc")
    engine.state.persist("best_acc", "best_acc")
    engine.state.best_acc = 1.0
    assert list(engine.state_dict()["persisted"]) == ["best_acc"]


def test_a_persisted_attribute_that_was_never_set_is_named(engine: Engine) -> None:
    engine.state.persist("best_acc")
    with pytest.raises(AttributeError, match=r"state\.best_acc.*persist"):
        engine.state_dict()


@pytest.mark.parametrize("name", ["epoch", "iteration", "metrics", "persist", "state_dict", "_persisted", "__dict__"])
def test_the_engines_own_attributes_cannot_be_persisted(engine: Engine, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        engine.state.persist("mine", name)
    assert engine.state_dict()["persisted"] == {}


@pytest.mark.parametrize("name", [3, None, ["best_acc"]])
def test_persist_takes_names(engine: Engine, name: Any) -> None:
    with pytest.raises(TypeError, match="persist"):
        engine.state.persist(name)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.tensor(1.0), "Tensor"),
        ([torch.tensor(1.0)], "Tensor"),
        ({"a": {"b": np.float64(1.0)}}, "float64"),
        ((1, 2), "tuple"),
        (object(), "object"),
        ({1.5j}, "set"),
    ],
)
def test_a_persisted_attribute_that_is_not_plain_is_named_with_what_is_wrong(
    engine: Engine, value: Any, kind: str
) -> None:
    engine.state.persist("best_acc")
    engine.state.best_acc = value
    with pytest.raises(TypeError, match=rf"state\.best_acc.*{kind}"):
        engine.state_dict()


# -- state_dict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_epochs", "options"),
    [
        (3, {}),
        (np.int64(3), {"epoch_length": np.int32(2), "max_iterations": np.int64(5)}),
        (torch.tensor(3), {}),
        (None, {"max_iterations": 2}),
    ],
)
def test_the_state_dict_is_plain_in_every_event(engine: Engine, max_epochs: Any, options: dict[str, Any]) -> None:
    state_dicts = [engine.state_dict()]
    for event in Events:
        engine.on(event, lambda engine: state_dicts.append(engine.state_dict()))
    engine.run([1, 2, 3], max_epochs, **options)
    for state_dict in [*state_dicts, engine.state_dict()]:
        assert_plain(state_dict)
        assert round_trip(state_dict) == state_dict
        assert json.loads(json.dumps(state_dict)) == state_dict
        Engine(lambda engine, batch: None).load_state_dict(state_dict)


def test_a_state_dict_is_a_value_that_the_run_does_not_change_later(engine: Engine) -> None:
    engine.state.persist("history")
    engine.state.history = [[0]]
    taken = engine.state_dict()
    kept = copy.deepcopy(taken)
    engine.on(Events.ITERATION_COMPLETED, lambda engine: engine.state.history[0].append(engine.state.output))
    engine.run([1, 2])
    assert taken == kept

    engine.load_state_dict(taken)
    engine.run([1, 2], max_epochs=2)
    assert engine.state.history != [[0]]
    assert taken == kept


def test_taking_a_state_dict_changes_nothing(engine: Engine) -> None:
    engine.run([1, 2])
    before = everything(engine)
    assert engine.state_dict() == engine.state_dict()
    assert everything(engine) == before


# -- what load_state_dict refuses --------------------------------------------------------------------------------


def everything(engine: Engine) -> dict[str, Any]:
    """All that `engine` holds, so that a refused call can be seen to have changed nothing."""
    held = {name: value for name, value in vars(engine).items() if name != "state"}
    return {**held, **{f"state.{name}": copy.deepcopy(value) for name, value in vars(engine.state).items()}}


def valid() -> dict[str, Any]:
    engine = Engine(lambda engine, batch: batch)
    engine.state.persist("best_acc")
    engine.state.best_acc = 0.5
    engine.run([1, 2, 3], max_epochs=2)
    return engine.state_dict()


KEYS = ["epoch", "iteration", "epoch_iteration", "epochs_completed", "max_epochs", "epoch_length", "persisted", "data"]


def test_the_state_dict_has_these_keys() -> None:
    assert list(valid()) == KEYS


def refused(state_dict: Any, match: str) -> None:
    engine = Engine(lambda engine, batch: batch)
    engine.state.persist("best_acc")
    engine.state.best_acc = 0.25
    engine.run([1, 2], max_epochs=1)
    before = everything(engine)
    with pytest.raises(ValueError, match=match):
        engine.load_state_dict(state_dict)
    assert everything(engine) == before
    assert engine.run([1, 2]).iteration == 2  # afresh: nothing was loaded


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named_and_the_engine_unchanged(key: str) -> None:
    state_dict = valid()
    del state_dict[key]
    refused(state_dict, key)


def test_an_unknown_key_is_named_and_the_engine_unchanged() -> None:
    refused({**valid(), "iterations": 3}, "'iterations'")


@pytest.mark.parametrize("value", [-1, 1.5, "3", True, [1], torch.tensor(1)])
@pytest.mark.parametrize("key", KEYS[:-1])
def test_a_wrong_value_is_named_and_the_engine_unchanged(key: str, value: Any) -> None:
    refused({**valid(), key: value}, key)


@pytest.mark.parametrize("key", KEYS[:4])
def test_a_position_without_a_number_is_named(key: str) -> None:
    refused({**valid(), key: None}, key)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "persisted"),
        ([], "persisted"),
        ({3: 1}, "persisted"),
        ({"iteration": 3}, "iteration"),
        ({"persist": 3}, "persist"),
        ({"best_acc": torch.zeros(1)}, "best_acc"),
        ({"best_acc": {"deep": [object()]}}, "best_acc"),
    ],
)
def test_wrong_persisted_attributes_are_named_and_the_engine_unchanged(value: Any, match: str) -> None:
    refused({**valid(), "persisted": value}, match)


@pytest.mark.parametrize(
    "contradiction",
    [
        {"epoch_iteration": 7},
        {"epochs_completed": 5},
        {"epochs_completed": 0},
        {"epoch": 9},
    ],
)
def test_a_position_that_contradicts_itself_is_refused(contradiction: dict[str, int]) -> None:
    refused({**valid(), **contradiction}, next(iter(contradiction)))


@pytest.mark.parametrize("state_dict", [None, 3, [], "epoch", torch.zeros(2)])
def test_what_is_no_dict_is_refused(state_dict: Any) -> None:
    refused(state_dict, "dict")


def test_an_empty_dict_names_all_that_is_missing() -> None:
    for key in KEYS:
        refused({}, key)
