"""The order of events, how a run and an epoch are left, exceptions, and metrics within the loop."""

import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dengine import Engine, EventEnum, Events
from dengine.metrics import Accuracy, Metric

Entry = tuple[str, int, int]
Log = list[Entry]
Recorder = Callable[..., Log]

ITERATION = ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"]


class Unsized:
    """Iterates anew each time, and tells no length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


def names(log: Log) -> list[str]:
    return [name for name, _, _ in log]


# -- order and number of events ----------------------------------------------------------------------------------


def test_the_order_of_a_run_of_two_epochs(engine: Engine, recorded: Recorder) -> None:
    log = recorded(engine)
    engine.run([1, 2], max_epochs=2)
    epoch = ["EPOCH_STARTED", *ITERATION, *ITERATION, "EPOCH_COMPLETED"]
    assert names(log) == ["STARTED", *epoch, *epoch, "COMPLETED"]


def test_the_step_and_the_update_of_metrics_lie_between_the_events_of_an_iteration(recorded: Recorder) -> None:
    log: list[str] = []
    engine = Engine(lambda engine, batch: log.append("step"))

    class Spy(Metric):
        def __init__(self) -> None:
            pass

        def reset(self) -> None:
            log.append("reset")

        def update(self, output: Any) -> None:
            log.append("update")

        def compute(self) -> float:
            log.append("compute")
            return 1.0

    for event in Events:
        engine.on(event, lambda engine, name=event.name: log.append(name))
    engine.add_metric(Spy(), "spy")
    engine.run([1], max_epochs=2)
    iteration = [*ITERATION[:3], "step", "update", ITERATION[3]]
    epoch = ["reset", "EPOCH_STARTED", *iteration, "compute", "EPOCH_COMPLETED"]
    assert log == ["STARTED", *epoch, *epoch, "COMPLETED"]


@pytest.mark.parametrize("length", [1, 10, 100])
@pytest.mark.parametrize("max_epochs", [1, 4])
@pytest.mark.parametrize("epoch_length", [None, 5, 50, 150])
def test_how_often_each_event_fires(
    engine: Engine, recorded: Recorder, length: int, max_epochs: int, epoch_length: int | None
) -> None:
    log = recorded(engine)
    engine.run(range(length), max_epochs, epoch_length=epoch_length)
    num_iterations = max_epochs * (epoch_length or length)
    expected = {event.name: 0 for event in Events}
    expected |= {"STARTED": 1, "COMPLETED": 1, "EPOCH_STARTED": max_epochs, "EPOCH_COMPLETED": max_epochs}
    expected |= dict.fromkeys(ITERATION, num_iterations)
    assert {name: names(log).count(name) for name in expected} == expected


@pytest.mark.parametrize("epoch_length", [1, 2, 3, 4, 7])
def test_the_end_of_the_data_within_an_epoch_is_not_an_event(
    engine: Engine, recorded: Recorder, epoch_length: int
) -> None:
    log = recorded(engine)
    engine.run(Unsized(3), max_epochs=2, epoch_length=epoch_length)
    epoch = ["EPOCH_STARTED", *ITERATION * epoch_length, "EPOCH_COMPLETED"]
    assert names(log) == ["STARTED", *epoch, *epoch, "COMPLETED"]


def test_data_of_unknown_length_is_asked_once_more_at_the_end_of_each_epoch(engine: Engine, recorded: Recorder) -> None:
    log = recorded(engine)
    engine.run(Unsized(2), max_epochs=2)
    epoch = ["EPOCH_STARTED", *ITERATION * 2, "GET_BATCH_STARTED", "EPOCH_COMPLETED"]
    assert names(log) == ["STARTED", *epoch, *epoch, "COMPLETED"]


@pytest.mark.parametrize("data", [range(3), Unsized(3)])
@pytest.mark.parametrize("epoch_length", [None, 2, 5])
@pytest.mark.parametrize("leave", [None, Events.GET_BATCH_STARTED, Events.ITERATION_COMPLETED])
def test_the_count_of_fetches_is_the_number_of_times_that_they_fired(
    engine: Engine, recorded: Recorder, data: Any, epoch_length: int | None, leave: EventEnum | None
) -> None:
    """Ignite's `GET_BATCH_STARTED(once=12)` fires twice after terminate_epoch()."""
    if leave is not None:
        engine.on(leave(every=4), lambda engine: engine.terminate_epoch())
    log = recorded(engine)
    for event in (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED):
        counts: list[int] = []
        engine.on(event(filter=lambda engine, count, counts=counts: counts.append(count)), lambda engine: None)
        log.clear()
        engine.run(data, max_epochs=5, epoch_length=epoch_length)
        assert counts == list(range(1, names(log).count(event.name) + 1))


def test_an_event_that_nobody_listens_to_costs_no_handler_its_call(engine: Engine) -> None:
    called: list[int] = []
    engine.on(Events.COMPLETED, lambda engine: called.append(1))
    engine.run([1, 2, 3], max_epochs=3)
    assert called == [1]


# -- terminate ---------------------------------------------------------------------------------------------------

REST_OF_ITERATION = {
    "GET_BATCH_STARTED": ITERATION[1:],
    "GET_BATCH_COMPLETED": ITERATION[2:],
    "ITERATION_STARTED": ITERATION[3:],
    "ITERATION_COMPLETED": [],
}


@pytest.mark.parametrize("data", [range(3), Unsized(3)])
@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("event", [event for event in Events if event.name in ITERATION])
def test_terminate_lets_the_iteration_finish_and_fires_no_epoch_completed(
    engine: Engine, recorded: Recorder, data: Any, event: EventEnum, count: int
) -> None:
    log = recorded(engine)
    if event is Events.GET_BATCH_STARTED and isinstance(data, Unsized) and count > 3:
        count += 1  # firing 4 finds the data at its end: see below
    engine.on(event(once=count), lambda engine: log.append(("terminate", 0, 0)) or engine.terminate())
    engine.run(data, max_epochs=5)
    place = names(log).index("terminate")
    assert names(log)[place + 1 :] == [*REST_OF_ITERATION[event.name], "TERMINATED", "COMPLETED"]
    count -= event is Events.GET_BATCH_STARTED and isinstance(data, Unsized) and count > 3
    assert engine.state.iteration == count
    assert engine.state.epoch == (count - 1) // 3
    assert log[-1] == ("COMPLETED", engine.state.epoch, count)


@pytest.mark.parametrize(
    ("event", "rest", "iteration", "epoch"),
    [
        (Events.STARTED, [], 0, 0),
        (Events.EPOCH_STARTED(once=1), [], 0, 0),
        (Events.EPOCH_STARTED(once=2), [], 3, 1),
        (Events.EPOCH_COMPLETED(once=1), [], 3, 0),
        (Events.EPOCH_COMPLETED(once=2), [], 6, 1),
    ],
)
def test_terminate_between_iterations_begins_no_other(
    engine: Engine, recorded: Recorder, event: Any, rest: list[str], iteration: int, epoch: int
) -> None:
    log = recorded(engine)
    engine.on(event, lambda engine: log.append(("terminate", 0, 0)) or engine.terminate())
    engine.run(range(3), max_epochs=5)
    place = names(log).index("terminate")
    assert names(log)[place + 1 :] == ["TERMINATED", "COMPLETED"]
    assert (engine.state.iteration, engine.state.epoch) == (iteration, epoch)


@pytest.mark.parametrize("event", [Events.COMPLETED, Events.TERMINATED])
def test_terminate_at_the_end_of_a_run_changes_nothing(engine: Engine, recorded: Recorder, event: EventEnum) -> None:
    def log_of(*, is_called: bool) -> Log:
        engine = Engine(lambda engine, batch: None)
        engine.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
        if is_called:
            engine.on(event, lambda engine: engine.terminate())
        log = recorded(engine)
        engine.run(range(3))
        return log

    assert log_of(is_called=True) == log_of(is_called=False)


def test_terminate_in_the_step_lets_the_iteration_finish(recorded: Recorder) -> None:
    engine = Engine(lambda engine, batch: engine.terminate() if batch == 1 else None)
    log = recorded(engine)
    engine.run(range(3))
    assert log[-3:] == [("ITERATION_COMPLETED", 0, 2), ("TERMINATED", 0, 2), ("COMPLETED", 0, 2)]


def test_terminate_in_the_last_iteration_of_an_epoch_does_not_complete_it(engine: Engine, recorded: Recorder) -> None:
    log = recorded(engine)
    engine.on(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())
    engine.run(range(3), max_epochs=2)
    assert log[-3:] == [("ITERATION_COMPLETED", 0, 3), ("TERMINATED", 0, 3), ("COMPLETED", 0, 3)]


def test_terminate_where_the_data_turns_out_to_be_over_ends_the_run(engine: Engine, recorded: Recorder) -> None:
    log = recorded(engine)
    engine.on(Events.GET_BATCH_STARTED(once=4), lambda engine: engine.terminate())
    engine.run(Unsized(3), max_epochs=2)
    assert log[-3:] == [("GET_BATCH_STARTED", 0, 3), ("TERMINATED", 0, 3), ("COMPLETED", 0, 3)]


def test_terminate_before_the_data_is_iterated_again_lets_the_fetch_finish(engine: Engine) -> None:
    engine.on(Events.GET_BATCH_STARTED(once=4), lambda engine: engine.terminate())
    assert engine.run(range(3), epoch_length=5).iteration == 4


def test_the_other_handlers_of_a_firing_still_run_after_terminate(engine: Engine) -> None:
    called: list[str] = []
    engine.on(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
    engine.on(Events.ITERATION_COMPLETED, lambda engine: called.append("after"))
    engine.run([1, 2])
    assert called == ["after"]


def test_terminated_fires_for_terminate_only(engine: Engine, recorded: Recorder) -> None:
    log = recorded(engine)
    engine.run(range(3), max_iterations=2)
    engine.on(Events.ITERATION_COMPLETED, lambda engine: engine.terminate_epoch())
    engine.run(range(3))
    engine.on(Events.STARTED, lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run(range(3))
    assert "TERMINATED" not in names(log)


# -- terminate_epoch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [range(3), Unsized(3)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("event", [event for event in Events if event.name in ITERATION])
def test_terminate_epoch_lets_the_iteration_finish_and_completes_the_epoch(
    engine: Engine, recorded: Recorder, data: Any, event: EventEnum, count: int
) -> None:
    log = recorded(engine)
    engine.on(event(once=count), lambda engine: log.append(("terminate", 0, 0)) or engine.terminate_epoch())
    engine.run(data, max_epochs=2, epoch_length=3)
    place = names(log).index("terminate")
    second_epoch = ["EPOCH_STARTED", *ITERATION * 3, "EPOCH_COMPLETED"]
    assert names(log)[place + 1 :] == [*REST_OF_ITERATION[event.name], "EPOCH_COMPLETED", *second_epoch, "COMPLETED"]
    assert engine.state.iteration == count + 3


def test_terminate_epoch_in_epoch_started_skips_its_iterations(engine: Engine, recorded: Recorder) -> None:
    log = recorded(engine)
    engine.on(Events.EPOCH_STARTED(once=2), lambda engine: engine.terminate_epoch())
    engine.run(range(2), max_epochs=3)
    full = ["EPOCH_STARTED", *ITERATION * 2, "EPOCH_COMPLETED"]
    assert names(log) == ["STARTED", *full, "EPOCH_STARTED", "EPOCH_COMPLETED", *full, "COMPLETED"]
    assert log[-1] == ("COMPLETED", 2, 4)


@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED])
def test_terminate_epoch_outside_an_epoch_changes_nothing(engine: Engine, recorded: Recorder, event: EventEnum) -> None:
    engine.on(event, lambda engine: engine.terminate_epoch())
    log = recorded(engine)
    engine.run(range(2), max_epochs=2)
    reference = Engine(lambda engine, batch: None)
    plain = recorded(reference)
    reference.run(range(2), max_epochs=2)
    assert log == plain


@pytest.mark.parametrize("order", [["terminate", "terminate_epoch"], ["terminate_epoch", "terminate"]])
def test_terminate_outweighs_terminate_epoch(engine: Engine, recorded: Recorder, order: list[str]) -> None:
    log = recorded(engine)
    for call in order:
        engine.on(Events.ITERATION_COMPLETED, lambda engine, call=call: getattr(engine, call)())
    engine.run(range(3), max_epochs=2)
    assert names(log)[-2:] == ["TERMINATED", "COMPLETED"]
    assert "EPOCH_COMPLETED" not in names(log)


# -- max_iterations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_iterations", range(1, 8))
def test_max_iterations_or_max_epochs_whichever_comes_first(
    engine: Engine, recorded: Recorder, max_iterations: int
) -> None:
    log = recorded(engine)
    engine.run(range(3), max_epochs=2, max_iterations=max_iterations)
    num_iterations = min(max_iterations, 6)
    assert engine.state.iteration == num_iterations
    assert names(log).count("ITERATION_COMPLETED") == num_iterations
    assert names(log).count("GET_BATCH_STARTED") == num_iterations
    # An epoch that is cut short is not completed; one that just ends is, and no other begins.
    assert names(log).count("EPOCH_COMPLETED") == num_iterations // 3
    assert names(log).count("EPOCH_STARTED") == -(-num_iterations // 3)
    assert log[-1][0] == "COMPLETED"


def test_max_iterations_may_be_the_only_end(engine: Engine) -> None:
    state = engine.run(range(3), max_epochs=None, max_iterations=10)
    assert (state.iteration, state.epoch, state.epoch_iteration) == (10, 3, 1)


# -- exceptions --------------------------------------------------------------------------------------------------


class Fatal(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), Fatal(), StopIteration(1)])
@pytest.mark.parametrize("with_handler", [False, True])
@pytest.mark.parametrize(
    "event", [event for event in Events if event not in (Events.TERMINATED, Events.EXCEPTION_RAISED)]
)
def test_an_exception_of_a_handler_is_raised_again_itself_and_reported_once(
    engine: Engine, recorded: Recorder, event: EventEnum, with_handler: bool, error: BaseException
) -> None:
    """Ignite swallows it where there is any handler of EXCEPTION_RAISED, and calls one that re-raises twice."""
    log = recorded(engine)
    reported: list[BaseException | None] = []
    if with_handler:
        engine.on(Events.EXCEPTION_RAISED, lambda engine: reported.append(engine.state.exception))

    def fail(engine: Engine) -> None:
        log.append(("raise", 0, 0))
        raise error

    engine.on(event, fail)
    with pytest.raises(type(error)) as raised:
        engine.run(range(2), max_epochs=2)
    assert raised.value is error
    assert reported == ([error] if with_handler else [])
    assert names(log)[names(log).index("raise") + 1 :] == ["EXCEPTION_RAISED"]
    assert error.__context__ is None


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), StopIteration()])
def test_an_exception_of_the_step_is_raised_again_itself(recorded: Recorder, error: BaseException) -> None:
    def step(engine: Engine, batch: Any) -> None:
        raise error

    engine = Engine(step)
    log = recorded(engine)
    with pytest.raises(type(error)) as raised:
        engine.run([1])
    assert raised.value is error
    assert names(log)[-2:] == ["ITERATION_STARTED", "EXCEPTION_RAISED"]


@pytest.mark.parametrize("options", [{"filter": lambda engine, count: next(iter([]))}, {"filter": lambda e, c: 1 / 0}])
def test_an_exception_of_a_filter_is_raised_again_itself(engine: Engine, options: dict[str, Any]) -> None:
    engine.on(Events.ITERATION_COMPLETED(**options), lambda engine: None)
    with pytest.raises((StopIteration, ZeroDivisionError)):
        engine.run([1])


def test_an_exception_is_raised_after_the_handler_was_removed(engine: Engine) -> None:
    """Ignite swallows every exception once a handler of it was added and removed."""
    engine.on(Events.EXCEPTION_RAISED, lambda engine: None).remove()
    engine.on(Events.STARTED, lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run([1])


def test_a_handler_of_exception_raised_that_raises_hides_neither_the_exception_nor_the_other_handlers(
    engine: Engine,
) -> None:
    called: list[str] = []

    def save_on_crash(engine: Engine) -> None:
        called.append("first")
        raise OSError("disk full")

    engine.on(Events.EXCEPTION_RAISED, save_on_crash)
    engine.on(Events.EXCEPTION_RAISED, lambda engine: called.append("second"))
    engine.on(Events.ITERATION_COMPLETED, lambda engine: 1 / 0)
    with pytest.warns(RuntimeWarning, match="save_on_crash.*disk full"), pytest.raises(ZeroDivisionError):
        engine.run([1])
    assert called == ["first", "second"]


def test_a_handler_that_raises_the_exception_again_raises_it_once(engine: Engine) -> None:
    called: list[int] = []

    def raise_again(engine: Engine) -> None:
        called.append(1)
        assert engine.state.exception is not None
        raise engine.state.exception

    engine.on(Events.EXCEPTION_RAISED, raise_again)
    engine.on(Events.STARTED, lambda engine: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # raising it again is no failure of the handler's own
        with pytest.raises(ZeroDivisionError):
            engine.run([1])
    assert called == [1]


@pytest.mark.parametrize(
    "attached", [Events.EXCEPTION_RAISED, Events.EXCEPTION_RAISED(filter=lambda e, c: bool(1 // 0))]
)
def test_the_exception_is_raised_even_where_warnings_are_errors(engine: Engine, attached: Any) -> None:
    def fail(engine: Engine) -> None:
        raise OSError("disk full")

    engine.on(attached, fail)
    engine.on(Events.STARTED, lambda engine: [][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(IndexError):
            engine.run([1])


def test_an_interrupt_in_a_handler_of_exception_raised_is_raised(engine: Engine) -> None:
    def interrupted(engine: Engine) -> None:
        raise KeyboardInterrupt

    engine.on(Events.EXCEPTION_RAISED, interrupted)
    engine.on(Events.STARTED, lambda engine: 1 / 0)
    with pytest.raises(KeyboardInterrupt) as raised:
        engine.run([1])
    assert isinstance(raised.value.__context__, ZeroDivisionError)


@pytest.mark.parametrize("call", ["terminate", "terminate_epoch"])
def test_a_handler_of_exception_raised_cannot_swallow_it(engine: Engine, call: str) -> None:
    engine.on(Events.EXCEPTION_RAISED, lambda engine: getattr(engine, call)())
    engine.on(Events.ITERATION_COMPLETED, lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run([1, 2, 3], max_epochs=2)
    assert engine.state.iteration == 1


def test_options_of_exception_raised_count_once_a_run(engine: Engine) -> None:
    called: list[str] = []
    engine.on(Events.EXCEPTION_RAISED(once=1), lambda engine: called.append("once"))
    engine.on(Events.EXCEPTION_RAISED(every=2), lambda engine: called.append("every"))
    engine.on(Events.STARTED, lambda engine: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            engine.run([1])
    assert called == ["once", "once"]


# -- metrics -----------------------------------------------------------------------------------------------------


class Total(Metric):
    total: float

    def __init__(self) -> None:
        super().__init__(output_transform=lambda output: output)
        self.add_state("total", 0, reduce="sum")

    def update(self, output: int) -> None:
        self.total += output

    def compute(self) -> float:
        return float(self.total)


@pytest.mark.parametrize("is_metric_first", [True, False])
def test_metrics_are_there_in_handlers_of_epoch_completed_whichever_was_attached_first(
    engine: Engine, is_metric_first: bool
) -> None:
    values: list[Any] = []
    if is_metric_first:
        engine.add_metric(Total(), "total")
    engine.on(Events.EPOCH_COMPLETED, lambda engine: values.append(engine.state.metrics["total"]), priority=10**6)
    if not is_metric_first:
        engine.add_metric(Total(), "total")
    engine.run([1, 2, 3], max_epochs=2)
    assert values == [6.0, 6.0]


def test_metrics_of_a_second_run_are_its_own(engine: Engine) -> None:
    engine.add_metrics({"total": Total(), "acc": Accuracy(output_transform=lambda output: (output, output))})
    assert engine.run([1, 2, 3]).metrics == {"total": 6.0, "acc": 1.0}
    assert engine.run([4]).metrics == {"total": 4.0, "acc": 1.0}


def test_metrics_after_an_exception_begin_anew(engine: Engine) -> None:
    engine.add_metric(Total(), "total")
    handle = engine.on(Events.ITERATION_COMPLETED(once=2), lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run([1, 2, 3])
    handle.remove()
    assert engine.run([1, 2]).metrics == {"total": 3.0}


def test_metrics_of_an_epoch_cut_short_by_terminate_epoch_are_of_its_iterations(engine: Engine) -> None:
    engine.add_metric(Total(), "total")
    engine.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate_epoch())
    assert engine.run([1, 2, 4]).metrics == {"total": 3.0}


def test_a_skipped_epoch_computes_no_metrics(engine: Engine) -> None:
    engine.add_metric(Accuracy(output_transform=lambda output: (output, output)), "acc")
    engine.on(Events.EPOCH_STARTED, lambda engine: engine.terminate_epoch())
    assert engine.run([1, 2, 4], max_epochs=2).metrics == {}


def test_an_epoch_cut_short_by_terminate_computes_no_metrics(engine: Engine) -> None:
    engine.add_metric(Total(), "total")
    engine.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
    assert engine.run([1, 2, 4]).metrics == {}


@pytest.mark.parametrize("data", [[1, 2, 4], Unsized(3)])
def test_a_run_resumed_at_the_very_end_of_an_epoch_completes_it_without_values(engine: Engine, data: Any) -> None:
    """A checkpoint every `len(loader)` iterations is common; nothing of that epoch is left to compute from."""
    first = Engine(lambda engine, batch: batch)
    first.on(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())
    first.run(data, max_epochs=2)
    engine.load_state_dict(first.state_dict())
    engine.add_metric(Accuracy(output_transform=lambda output: (output, output)), "acc")
    epochs: list[tuple[int, dict[str, Any]]] = []
    engine.on(Events.EPOCH_COMPLETED, lambda engine: epochs.append((engine.state.epoch, dict(engine.state.metrics))))
    engine.run(data, max_epochs=2)
    assert epochs == [(0, {}), (1, {"acc": 1.0})]


def test_a_metric_that_saw_nothing_in_a_whole_epoch_is_an_error_that_names_it(engine: Engine) -> None:
    from dengine import NotComputableError

    class Nothing(Total):
        def compute(self) -> float:
            raise NotComputableError("nothing was seen")

    engine.add_metric(Nothing(), "mine")
    with pytest.raises(NotComputableError, match="mine"):
        engine.run([1])


def test_metrics_update_without_gradients(engine: Engine) -> None:
    modes: list[bool] = []

    class Spy(Total):
        def update(self, output: Any) -> None:
            modes.append(torch.is_grad_enabled())

    engine.add_metric(Spy(), "spy")
    engine.run([1])
    assert modes == [False]
    assert torch.is_grad_enabled()


def test_a_name_already_taken_is_a_value_error_and_nothing_is_added(engine: Engine) -> None:
    engine.add_metric(Total(), "total")
    with pytest.raises(ValueError, match="'total'"):
        engine.add_metric(Total(), "total")
    with pytest.raises(ValueError, match="'total'"):
        engine.add_metrics({"other": Total(), "total": Total()})
    assert engine.run([1]).metrics == {"total": 1.0}


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("end", ["completed", "terminated", "exception", "never run"])
def test_an_engine_is_freed_without_the_garbage_collector(end: str) -> None:
    def step(engine: Engine, batch: int) -> int:
        if end == "terminated":
            engine.terminate()
        if end == "exception":
            raise ValueError
        return batch

    engine = Engine(step)
    engine.on(Events.ITERATION_COMPLETED(every=2), lambda engine: None)
    engine.on(Events.EPOCH_COMPLETED | Events.EXCEPTION_RAISED, print, rank_zero_only=True).remove()
    engine.register_events("mine")
    engine.add_metric(Total(), "total")
    if end == "exception":
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            engine.run([1, 2, 3])
        del raised
        engine.state.exception = None  # its traceback holds the frames of the run
    elif end != "never run":
        engine.run([1, 2, 3], max_epochs=2)
    reference = weakref.ref(engine)
    del engine
    assert reference() is None


@pytest.mark.usefixtures("no_gc")
def test_a_handle_keeps_no_engine_alive() -> None:
    engine = Engine(lambda engine, batch: None)
    handle = engine.on(Events.STARTED, lambda engine: None)
    reference = weakref.ref(engine)
    del engine
    assert reference() is None
    handle.remove()


@pytest.mark.usefixtures("no_gc")
def test_the_iterator_over_the_data_is_closed_when_the_epoch_is_left(engine: Engine) -> None:
    closed: list[str] = []

    class Files:
        def __iter__(self) -> Iterator[int]:
            try:
                yield from range(5)
            finally:
                closed.append("closed")

    engine.on(Events.EPOCH_COMPLETED, lambda engine: closed.append("epoch"))
    engine.run(Files(), max_epochs=2, epoch_length=2)
    assert closed == ["closed", "epoch"] * 2


# -- what the contract promises of the package's own examples ---------------------------------------------------


def test_the_examples_in_the_docstrings_print_what_they_say() -> None:
    modules = [f"dengine.engine.{name}" for name in ("engine", "loop", "events", "state", "data", "dispatch")]
    code = (
        f"import doctest, importlib; assert not sum(doctest.testmod(importlib.import_module(m))[0] for m in {modules})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
