"""Fresh and resumed runs: what the next run begins with, after every way in which one can end."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine import Engine, Events

Entry = tuple[str, int, int]
Log = list[Entry]
Recorder = Callable[..., Log]


class Unsized:
    """Iterates anew each time, and tells no length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


class Interrupt(BaseException):
    pass


def echo(engine: Engine, batch: Any) -> Any:
    return batch


def stand(engine: Engine) -> tuple[int, int, int]:
    return engine.state.epoch, engine.state.iteration, engine.state.epoch_iteration


# -- a second run ------------------------------------------------------------------------------------------------

FIRED = [event for event in Events if event not in (Events.TERMINATED, Events.EXCEPTION_RAISED)]


@pytest.mark.parametrize("event", FIRED)
@pytest.mark.parametrize(
    "end", ["terminate", "terminate_epoch", RuntimeError, KeyboardInterrupt, SystemExit, Interrupt]
)
def test_the_second_run_is_a_full_one_however_the_first_ended(
    engine: Engine, recorded: Recorder, event: Events, end: Any
) -> None:
    """After an exception Ignite's next run does nothing; after terminate() it goes on in the next epoch."""
    reference = Engine(echo)
    full = recorded(reference)
    reference.run([1, 2, 3], max_epochs=2)

    def leave(engine: Engine) -> None:
        if isinstance(end, str):
            getattr(engine, end)()
        else:
            raise end("first run")

    handle = engine.on(event, leave)
    if isinstance(end, str):
        engine.run([1, 2, 3], max_epochs=2)
    else:
        with pytest.raises(end):
            engine.run([1, 2, 3], max_epochs=2)
    handle.remove()
    log = recorded(engine)
    engine.run([1, 2, 3], max_epochs=2)
    assert log == full
    assert engine.state.output == 3
    assert engine.state.exception is None


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_the_second_run_is_a_full_one_after_the_step_raised(recorded: Recorder, iteration: int) -> None:
    def step(engine: Engine, batch: int) -> int:
        if is_first and engine.state.iteration == iteration:
            raise RuntimeError("step")
        return batch

    is_first = True
    engine = Engine(step)
    with pytest.raises(RuntimeError, match="step"):
        engine.run([1, 2, 3])
    is_first = False
    assert stand(engine) == (0, iteration, iteration)
    engine.run([1, 2, 3])
    assert stand(engine) == (0, 3, 3)


def test_a_completed_run_is_not_continued_by_a_larger_max_epochs(engine: Engine) -> None:
    engine.run([1, 2], max_epochs=2)
    assert engine.run([1, 2], max_epochs=3).iteration == 6
    assert engine.run([1, 2], max_epochs=1).iteration == 2


def test_terminate_without_a_run_does_nothing_to_the_next(engine: Engine) -> None:
    engine.terminate()
    engine.terminate_epoch()
    assert engine.run([1, 2]).iteration == 2


def test_counts_of_events_begin_anew_in_each_run(engine: Engine, recorded: Recorder) -> None:
    called: list[str] = []
    for event in (Events.STARTED, Events.GET_BATCH_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        engine.on(event(once=1), lambda engine, name=event.name: called.append(name))
    for _ in range(3):
        called.clear()
        engine.run([1, 2], max_epochs=2)
        assert called == ["STARTED", "GET_BATCH_STARTED", "ITERATION_COMPLETED", "EPOCH_COMPLETED"]


# -- wrong arguments ---------------------------------------------------------------------------------------------


def everything(engine: Engine) -> dict[str, Any]:
    held = {name: value for name, value in vars(engine).items() if name != "state"}
    return {**held, **{f"state.{name}": value for name, value in vars(engine.state).items()}}


@pytest.mark.parametrize(
    ("error", "match", "data", "options"),
    [
        (TypeError, "iterated over", 3, {}),
        (TypeError, "iterated over", None, {}),
        (TypeError, "iterated over", print, {}),
        (TypeError, "iterated over", list, {}),
        (ValueError, "max_epochs=0", [1], {"max_epochs": 0}),
        (ValueError, "max_epochs=-1", [1], {"max_epochs": -1}),
        (TypeError, "max_epochs='2'", [1], {"max_epochs": "2"}),
        (TypeError, "max_epochs=2.0", [1], {"max_epochs": 2.0}),
        (TypeError, "max_epochs=True", [1], {"max_epochs": True}),
        (ValueError, "max_iterations", [1], {"max_epochs": None}),
        (ValueError, "max_iterations=0", [1], {"max_iterations": 0}),
        (TypeError, "max_iterations=1.5", [1], {"max_iterations": 1.5}),
        (ValueError, "epoch_length=0", [1], {"epoch_length": 0}),
        (ValueError, "epoch_length=-3", [1], {"epoch_length": -3}),
        (TypeError, "epoch_length='a'", [1], {"epoch_length": "a"}),
        (ValueError, "no batch", [], {}),
    ],
)
@pytest.mark.parametrize("before", ["fresh", "ran", "loaded"])
def test_a_wrong_argument_is_named_and_leaves_everything_unchanged(
    engine: Engine, recorded: Recorder, before: str, error: Any, match: str, data: Any, options: dict[str, Any]
) -> None:
    if before != "fresh":
        engine.run([1, 2, 3], max_epochs=2)
    if before == "loaded":
        engine.load_state_dict(engine.state_dict())
    log = recorded(engine)
    held = everything(engine)
    with pytest.raises(error, match=match):
        engine.run(data, **options)
    assert everything(engine) == held
    assert log == []
    # A run that was to be resumed still is.
    assert engine.run([1, 2, 3], max_epochs=3).iteration == 9
    assert len([name for name, _, _ in log if name == "ITERATION_COMPLETED"]) == (3 if before == "loaded" else 9)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_whole_numbers_of_other_libraries_are_taken(engine: Engine, kind: Any) -> None:
    state = engine.run([1, 2, 3], kind(2), epoch_length=kind(2), max_iterations=kind(3))
    assert (state.iteration, state.max_epochs, state.epoch_length) == (3, 2, 2)
    assert type(state.max_epochs) is type(state.epoch_length) is int


@pytest.mark.parametrize("function", [None, 3, "step", [print]])
def test_a_process_function_that_is_not_callable_is_a_type_error(function: Any) -> None:
    with pytest.raises(TypeError, match="Engine"):
        Engine(function)


# -- run inside a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [event for event in Events if event is not Events.EXCEPTION_RAISED])
def test_a_run_inside_a_run_of_the_same_engine_is_an_error_that_says_what_to_do(
    engine: Engine, recorded: Recorder, event: Events
) -> None:
    if event is Events.TERMINATED:
        engine.on(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
    errors: list[str] = []

    def nested(engine: Engine) -> None:
        held = stand(engine)
        for call in (lambda: engine.run([7] * 9, max_epochs=5), lambda: engine.load_state_dict(engine.state_dict())):
            with pytest.raises(RuntimeError, match="second Engine") as raised:
                call()
            errors.append(str(raised.value))
        assert stand(engine) == held

    engine.on(event, nested)
    log = recorded(engine)
    engine.run([1, 2])
    assert errors
    assert log[-1][0] == "COMPLETED"


def test_an_error_of_a_nested_run_that_nobody_catches_ends_the_run_and_the_next_one_works(engine: Engine) -> None:
    handle = engine.on(Events.ITERATION_COMPLETED, lambda engine: engine.run([1]))
    with pytest.raises(RuntimeError, match="running"):
        engine.run([1, 2])
    handle.remove()
    assert engine.run([1, 2]).iteration == 2


@pytest.mark.parametrize("event", FIRED)
def test_another_engine_may_run_in_a_handler_of_any_event(engine: Engine, recorded: Recorder, event: Events) -> None:
    evaluator = Engine(lambda engine, batch: -batch)
    iterations: list[int] = []

    @engine.on(event)
    def evaluate(engine: Engine) -> None:
        held = (stand(engine), engine.state.output, engine.state.batch, engine.firing)
        iterations.append(evaluator.run([1, 2, 3, 4], max_epochs=2).iteration)
        assert (stand(engine), engine.state.output, engine.state.batch, engine.firing) == held

    log = recorded(engine)
    engine.run([1, 2], max_epochs=2)
    reference = Engine(echo)
    plain = recorded(reference)
    reference.run([1, 2], max_epochs=2)
    assert log == plain
    assert iterations == [8] * len([name for name, _, _ in log if name == event.name])


def test_terminate_of_an_evaluator_inside_a_handler_leaves_the_trainer_running(engine: Engine) -> None:
    evaluator = Engine(lambda engine, batch: engine.terminate())
    engine.on(Events.ITERATION_COMPLETED, lambda engine: evaluator.run([1, 2]))
    assert engine.run([1, 2, 3]).iteration == 3
    assert evaluator.state.iteration == 1


def test_terminate_of_the_trainer_inside_a_handler_of_its_evaluator_ends_the_trainer(engine: Engine) -> None:
    evaluator = Engine(echo)
    evaluator.on(Events.EPOCH_COMPLETED, lambda _: engine.terminate())
    engine.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1]))
    assert engine.run([1, 2], max_epochs=5).epoch == 0


def test_an_exception_in_an_evaluator_ends_the_trainer_and_both_can_run_again(engine: Engine) -> None:
    evaluator = Engine(lambda engine, batch: 1 // batch)
    data = [0]
    engine.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(data))
    with pytest.raises(ZeroDivisionError):
        engine.run([1])
    data[0] = 1
    assert engine.run([1]).iteration == evaluator.state.iteration == 1


# -- resuming ----------------------------------------------------------------------------------------------------


def test_a_resumed_run_does_what_is_left_of_the_total(engine: Engine) -> None:
    engine.run([1, 2, 3], max_epochs=2)
    engine.load_state_dict(engine.state_dict())
    assert stand(engine) == (1, 6, 3)
    engine.run([1, 2, 3], max_epochs=5)
    assert stand(engine) == (4, 15, 3)


def test_only_the_first_run_after_loading_is_a_resumed_one(engine: Engine) -> None:
    engine.run([1, 2, 3], max_epochs=2)
    engine.load_state_dict(engine.state_dict())
    engine.run([1, 2, 3], max_epochs=3)
    assert engine.run([1, 2, 3], max_epochs=3).iteration == 9
    steps: list[int] = []
    engine.on(Events.ITERATION_COMPLETED, lambda engine: steps.append(1))
    engine.run([1, 2, 3], max_epochs=3)
    assert len(steps) == 9


def test_a_resumed_run_that_raises_is_not_resumed_by_the_next(engine: Engine) -> None:
    engine.run([1, 2], max_epochs=2)
    engine.load_state_dict(engine.state_dict())
    handle = engine.on(Events.STARTED, lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run([1, 2], max_epochs=3)
    handle.remove()
    iterations: list[int] = []
    engine.on(Events.ITERATION_COMPLETED, lambda engine: iterations.append(engine.state.iteration))
    engine.run([1, 2], max_epochs=3)
    assert iterations == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("options", [{"max_epochs": 1}, {"max_epochs": 2}, {"max_epochs": 9, "max_iterations": 6}])
def test_a_resumed_run_with_nothing_left_fires_started_and_completed_only(
    engine: Engine, recorded: Recorder, options: dict[str, Any]
) -> None:
    engine.run([1, 2, 3], max_epochs=2)
    engine.load_state_dict(engine.state_dict())
    log = recorded(engine)
    engine.run([1, 2, 3], **options)
    assert log == [("STARTED", 1, 6), ("COMPLETED", 1, 6)]


def test_loading_the_state_of_a_new_engine_is_a_fresh_run(engine: Engine, recorded: Recorder) -> None:
    engine.load_state_dict(Engine(echo).state_dict())
    log = recorded(engine)
    engine.run([1])
    assert [name for name, _, _ in log][:3] == ["STARTED", "EPOCH_STARTED", "GET_BATCH_STARTED"]


def test_the_loaded_position_is_readable_before_the_run(engine: Engine) -> None:
    whole = Engine(echo)
    whole.run([1, 2], max_epochs=3)
    state_dict = whole.state_dict()
    engine.load_state_dict(state_dict)
    assert stand(engine) == (2, 6, 2)
    assert engine.state_dict() == state_dict


def test_counts_of_iterations_and_epochs_go_on_in_a_resumed_run(engine: Engine) -> None:
    engine.run([1, 2, 3], max_epochs=2)
    engine.load_state_dict(engine.state_dict())
    iterations: list[int] = []
    epochs: list[int] = []
    engine.on(Events.ITERATION_COMPLETED(every=4), lambda engine: iterations.append(engine.state.iteration))
    engine.on(Events.EPOCH_COMPLETED(every=2), lambda engine: epochs.append(engine.state.epoch))
    engine.on(Events.EPOCH_STARTED(once=4), lambda engine: epochs.append(-engine.state.epoch))
    engine.run([1, 2, 3], max_epochs=6)
    assert iterations == [8, 12, 16]
    assert epochs == [-3, 3, 5]


def test_counts_of_other_events_begin_anew_in_a_resumed_run(engine: Engine) -> None:
    engine.run([1, 2, 3], max_epochs=2)
    engine.load_state_dict(engine.state_dict())
    called: list[str] = []
    for event in (Events.STARTED, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.COMPLETED):
        engine.on(event(once=1), lambda engine, name=event.name: called.append(name))
    engine.run([1, 2, 3], max_epochs=3)
    assert called == ["STARTED", "GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "COMPLETED"]


# -- the law: an interrupted run and its continuation are one run ------------------------------------------------


def logged_run(
    recorded: Recorder, data: Any, *, state_dict: dict[str, Any] | None = None, script: Any = None, **options: Any
) -> tuple[Log, list[dict[str, Any]]]:
    """The log of a run, and the state dict taken in a handler of each of its entries."""
    engine = Engine(echo)
    log = recorded(engine)
    taken: list[dict[str, Any]] = []
    for event in Events:
        engine.on(event, lambda engine: taken.append(engine.state_dict()), priority=-1000)
    if script is not None:
        script(engine)
    if state_dict is not None:
        engine.load_state_dict(state_dict)
    engine.run(data, **options)
    assert len(taken) == len(log)
    return log, taken


def continued_at(log: Log, cut: int) -> int:
    """From where on an uninterrupted log is repeated, if it was cut in a handler of its entry `cut`."""
    name, _, iteration = log[cut]
    if name in ("GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED"):
        # The iteration is under way, so it is done again.
        while log[cut][0] != "GET_BATCH_STARTED":
            cut -= 1
        name = "EPOCH_STARTED" if log[cut - 1][0] == "EPOCH_STARTED" else name
        cut -= 1
        iteration = log[cut][2]
    if name == "EPOCH_STARTED" and iteration == 0:
        return cut  # nothing was done at all yet: the training begins anew
    return cut + 1


DATA: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1, 2],
    "unsized": lambda: Unsized(3),
    "one-shot, given anew": lambda: iter([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]),
}
ENDS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 3},
    "iterations within an epoch": {"max_epochs": 3, "max_iterations": 5},
    "iterations at an epoch's end": {"max_epochs": None, "max_iterations": 6},
    "shorter epochs": {"max_epochs": 3, "epoch_length": 2},
    "longer epochs": {"max_epochs": 2, "epoch_length": 5},
    "epochs of one": {"max_epochs": 3, "epoch_length": 1},
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_a_run_cut_in_any_handler_and_continued_fires_what_the_whole_run_fires(
    recorded: Recorder, make: Callable[[], Any], end: dict[str, Any]
) -> None:
    if "one-shot" in str([name for name, value in DATA.items() if value is make]) and "epoch_length" not in end:
        end = {**end, "epoch_length": 3}  # else an epoch of it is all that there is
    whole, taken = logged_run(recorded, make(), **end)
    for cut, state_dict in enumerate(taken):
        rest, _ = logged_run(recorded, make(), state_dict=state_dict, **end)
        assert rest[0][0] == "STARTED"
        # A training that is over already starts and completes again, with nothing between.
        assert rest[1:] == (whole[continued_at(whole, cut) :] or whole[-1:]), f"cut in {whole[cut]}"


@pytest.mark.parametrize("make", [DATA["list"], DATA["unsized"]])
def test_a_run_cut_twice_is_continued_as_if_cut_once(recorded: Recorder, make: Callable[[], Any]) -> None:
    whole, taken = logged_run(recorded, make(), max_epochs=2)
    for cut, state_dict in enumerate(taken):
        rest, taken_again = logged_run(recorded, make(), state_dict=state_dict, max_epochs=2)
        for second_cut in range(1, len(rest)):
            last, _ = logged_run(recorded, make(), state_dict=taken_again[second_cut], max_epochs=2)
            place = min(continued_at(whole, cut) + second_cut, len(whole)) - 1
            assert last[1:] == (whole[continued_at(whole, place) :] or whole[-1:]), (
                f"cut in {whole[cut]} and {whole[place]}"
            )


@pytest.mark.parametrize("event", FIRED)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_run_that_was_terminated_and_then_continued_fires_what_the_whole_run_fires(
    recorded: Recorder, event: Events, count: int
) -> None:
    whole, _ = logged_run(recorded, [0, 1, 2], max_epochs=3)
    engine = Engine(echo)
    log = recorded(engine)
    engine.on(event(once=count), lambda engine: engine.terminate())
    engine.run([0, 1, 2], max_epochs=3)
    first = [entry for entry in log if entry[0] not in ("TERMINATED", "COMPLETED")]
    rest, _ = logged_run(recorded, [0, 1, 2], state_dict=engine.state_dict(), max_epochs=3)
    if log[-1][1:] == whole[-1][1:] and whole[-2] in log:
        assert rest[1:] == whole[-1:]
    elif first[-1][:1] == ("STARTED",):
        assert rest == whole
    elif first[-1] == ("EPOCH_STARTED", 0, 0):
        assert rest[1:] == whole[1:]
    else:
        assert first + rest[1:] == whole


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("iteration", range(1, 7))
def test_a_state_taken_after_the_step_raised_has_that_iteration_done_again(error: Any, iteration: int) -> None:
    seen: list[tuple[int, int, int]] = []

    def step(engine: Engine, batch: int) -> None:
        if is_first and engine.state.iteration == iteration:
            raise error
        seen.append((engine.state.epoch, engine.state.iteration, batch))

    is_first = True
    engine = Engine(step)
    in_handler: list[dict[str, Any]] = []
    engine.on(Events.EXCEPTION_RAISED, lambda engine: in_handler.append(engine.state_dict()))
    with pytest.raises(error):
        engine.run([0, 1, 2], max_epochs=2)
    is_first = False
    assert in_handler == [engine.state_dict()]
    resumed = Engine(step)
    resumed.load_state_dict(engine.state_dict())
    resumed.run([0, 1, 2], max_epochs=2)
    assert seen == [(index // 3, index + 1, index % 3) for index in range(6)]


@pytest.mark.parametrize("iteration", range(1, 7))
def test_a_state_taken_after_a_handler_of_iteration_completed_raised_has_that_iteration_done(iteration: int) -> None:
    """Its step has changed the model: doing it again would do it twice."""
    engine = Engine(echo)
    engine.on(Events.ITERATION_COMPLETED(once=iteration), lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run([0, 1, 2], max_epochs=2)
    assert engine.state_dict()["iteration"] == iteration


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("cut", range(1, 7))
def test_skipped_and_shortened_epochs_are_continued_after(recorded: Recorder, epoch: int, cut: int) -> None:
    def script(engine: Engine) -> None:
        engine.on(Events.EPOCH_STARTED(once=epoch + 1), lambda engine: engine.terminate_epoch())

    whole, taken = logged_run(recorded, [0, 1, 2], script=script, max_epochs=3)
    for place, entry in enumerate(whole):
        if entry[0] in ("ITERATION_COMPLETED", "EPOCH_COMPLETED", "COMPLETED"):
            rest, _ = logged_run(recorded, [0, 1, 2], state_dict=taken[place], script=script, max_epochs=3)
            assert rest[1:] == (whole[place + 1 :] or whole[-1:])


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 5),
    epoch_length=st.none() | st.integers(1, 11),
    max_epochs=st.integers(1, 4),
    max_iterations=st.none() | st.integers(1, 25),
    is_sized=st.booleans(),
    place=st.floats(0, 1, exclude_max=True),
)
def test_the_batches_of_a_run_cut_anywhere_and_continued_are_those_of_the_whole_run(
    length: int, epoch_length: int | None, max_epochs: int, max_iterations: int | None, is_sized: bool, place: float
) -> None:
    data: Any = range(length) if is_sized else Unsized(length)
    options: dict[str, Any] = {"max_epochs": max_epochs, "epoch_length": epoch_length, "max_iterations": max_iterations}

    def steps_of(engine: Engine) -> list[tuple[int, int, int, int]]:
        steps: list[tuple[int, int, int, int]] = []
        engine.on(Events.ITERATION_COMPLETED, lambda engine: steps.append((*stand(engine), engine.state.output)))
        return steps

    whole = Engine(echo)
    expected = steps_of(whole)
    whole.run(data, **options)

    cut = 1 + int(place * len(expected))
    first = Engine(echo)
    steps = steps_of(first)
    first.on(Events.ITERATION_COMPLETED(once=cut), lambda engine: engine.terminate())
    first.run(data, **options)
    second = Engine(echo)
    rest = steps_of(second)
    second.load_state_dict(first.state_dict())
    second.run(data, **options)
    assert steps + rest == expected
    assert second.state_dict() == whole.state_dict()
