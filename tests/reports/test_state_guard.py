"""What a handler sets on `engine.state` is its own, or what the loop reads: nothing else is taken without a word."""

import copy
import pickle
from typing import Any

import pytest

from dengine import Engine, Events, State

# What only the loop sets -> what its error has to name.
KEPT = {
    "epoch": "load_state_dict",
    "iteration": "load_state_dict",
    "epoch_iteration": "terminate_epoch",
    "epochs_completed": "terminate_epoch",
    "max_epochs": r"run\(data, max_epochs=",
    "epoch_length": r"run\(data, epoch_length=",
    "dataloader": r"run\(data\)",
    "preempted": "preempt",
}


def nothing(engine: Engine, batch: Any) -> Any:
    return batch


@pytest.mark.parametrize("name", KEPT)
def test_setting_what_the_loop_keeps_names_what_to_call_instead(name: str) -> None:
    engine = Engine(nothing)
    with pytest.raises(AttributeError, match=rf"state\.{name} .*{KEPT[name]}"):
        setattr(engine.state, name, 3)


@pytest.mark.parametrize("event", [event for event in Events if event.name not in ("TERMINATED", "EXCEPTION_RAISED")])
def test_a_handler_of_any_event_that_sets_one_ends_the_run_by_that_error(event: Events) -> None:
    engine = Engine(nothing)

    @engine.on(event)
    def longer(engine: Engine) -> None:
        engine.state.max_epochs = 7

    with pytest.raises(AttributeError, match="max_epochs"):
        engine.run([1, 2], max_epochs=2)


def test_adding_to_one_and_deleting_one_are_refused_too() -> None:
    engine = Engine(nothing)
    with pytest.raises(AttributeError, match="load_state_dict"):
        engine.state.iteration += 1
    with pytest.raises(AttributeError):
        del engine.state.epoch
    assert (engine.state.iteration, engine.state.epoch) == (0, 0)


def test_own_attributes_batch_output_and_metrics_may_be_set() -> None:
    seen: list[Any] = []
    engine = Engine(lambda engine, batch: seen.append(batch) or batch)

    @engine.on(Events.ITERATION_STARTED)
    def change(engine: Engine) -> None:
        engine.state.batch = 10 * engine.state.batch

    @engine.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        engine.state.best = engine.state.output
        engine.state.output = -1
        engine.state.metrics = {"best": engine.state.best}
        engine.state.metrics["other"] = 1.0

    state: Any = engine.run([1, 2])
    assert seen == [10, 20]
    assert (state.best, state.output, state.metrics) == (20, -1, {"best": 20, "other": 1.0})


def test_a_state_is_guarded_before_a_run_after_one_and_without_an_engine() -> None:
    engine = Engine(nothing)
    for state in (engine.state, State(), engine.run([1, 2, 3], max_epochs=2)):
        with pytest.raises(AttributeError, match=r"run\(data, max_epochs="):
            state.max_epochs = 5
    assert (engine.state.iteration, engine.state.epoch, engine.state.max_epochs) == (6, 1, 2)


def test_a_copy_of_a_state_has_its_values_and_its_guard() -> None:
    state: Any = Engine(nothing).run([1, 2, 3])
    state.mine = "kept"
    for other in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert (other.iteration, other.epoch, other.epoch_length, other.mine) == (3, 0, 3, "kept")
        with pytest.raises(AttributeError):
            other.iteration = 0


def test_a_loaded_position_is_gone_on_from() -> None:
    first = Engine(nothing)
    first.on(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())
    first.run([1, 2], max_epochs=3)
    second = Engine(nothing)
    second.load_state_dict(first.state_dict())
    assert second.run([1, 2], max_epochs=3).iteration == 6


def test_the_repr_of_a_state_says_where_the_run_is_and_reads_no_value() -> None:
    class Value:
        def __repr__(self) -> str:
            raise AssertionError("a value was read")

    state: Any = Engine(nothing).run([1, 2, 3], max_epochs=2)
    state.metrics["acc"] = Value()
    state.best_acc = Value()
    text = repr(state)
    assert "epoch=1" in text
    assert "iteration=6" in text
    assert "max_epochs=2" in text
    assert "'acc'" in text
    assert "'best_acc'" in text
