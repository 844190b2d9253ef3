"""What a handler, or a supervised engine, is given wrongly is told in the words of who gives it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dengine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from dengine import handlers as handlers_of_dengine
from dengine.handlers import (
    EMA,
    Checkpoint,
    ConsistencyCheck,
    EarlyStopping,
    Guard,
    LRScheduler,
    MemoryMonitor,
    ParamGroupLogger,
    Preemption,
    Profiler,
    ProgressBar,
    Replay,
    TerminateOnNan,
    ThroughputMonitor,
    TimeLimit,
    Timer,
    TrackingHandler,
)


class Log:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append(values)


class Value:
    """A metric whose value is `value`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def reset(self) -> None: ...
    def update(self, output: Any) -> None: ...
    def compute(self) -> Any:
        return self.value


def nothing(engine: Engine, batch: Any) -> Any:
    return batch


def all_handlers(tmp_path: Path) -> dict[str, Any]:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "Checkpoint": Checkpoint({"model": model}, tmp_path, n_saved=3),
        "ConsistencyCheck": ConsistencyCheck(model),
        "EMA": EMA(model, decay=0.5),
        "EarlyStopping": EarlyStopping(7, lambda engine: 1.0, Engine(nothing), mode="min", start_after=2),
        "Guard": Guard(Engine(nothing), model, optimizer),
        "LRScheduler": LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1)),
        "MemoryMonitor": MemoryMonitor(),
        "ParamGroupLogger": ParamGroupLogger(optimizer, Log()),
        "Preemption": Preemption(lambda engine: None),
        "Profiler": Profiler(tmp_path, active=4),
        "ProgressBar": ProgressBar(desc="Train"),
        "Replay": Replay(model, every=50),
        "TerminateOnNan": TerminateOnNan(),
        "ThroughputMonitor": ThroughputMonitor(),
        "TimeLimit": TimeLimit(60.0),
        "Timer": Timer(),
        "TrackingHandler": TrackingHandler(Log(), ["loss"]),
    }


SEVERAL_EVENTS = {"MemoryMonitor", "Preemption", "Profiler", "ProgressBar", "Replay", "ThroughputMonitor", "Timer"}


def test_every_handler_has_a_repr_of_one_line_that_names_it(tmp_path: Path) -> None:
    found = all_handlers(tmp_path)
    assert set(handlers_of_dengine.__all__) <= found.keys()
    for name, handler in found.items():
        assert re.fullmatch(rf"{name}\(.*\)", repr(handler)), repr(handler)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Checkpoint", ["'model'", "n_saved=3"]),
        ("EMA", ["Linear", "decay=0.5", "num_updates=0"]),
        ("EarlyStopping", ["patience=7", "mode='min'", "start_after=2"]),
        ("Guard", ["Linear", "SGD", "on_bad='skip'", "max_bad=10"]),
        ("LRScheduler", ["StepLR"]),
        ("TimeLimit", ["seconds=60.0"]),
        ("TrackingHandler", ["'loss'"]),
        ("Preemption", ["SIGTERM"]),
        ("ProgressBar", ["'Train'"]),
        ("Profiler", ["active=4"]),
    ],
)
def test_a_repr_says_what_the_handler_was_made_with(name: str, parts: list[str], tmp_path: Path) -> None:
    text = repr(all_handlers(tmp_path)[name])
    for part in parts:
        assert part in text


def test_no_handler_has_both_ways_and_who_takes_the_wrong_one_is_told_the_right_one(tmp_path: Path) -> None:
    engine = Engine(nothing)
    for name, handler in all_handlers(tmp_path).items():
        assert callable(handler) != hasattr(handler, "attach"), name
        if name in SEVERAL_EVENTS:
            with pytest.raises(TypeError, match=rf"{name}\(\.\.\.\)\.attach\(engine\)"):
                engine.on(Events.STARTED, handler)
        else:
            with pytest.raises(AttributeError, match=rf"{name} has no 'attach'.*\.on\(Events\."):
                handler.attach(engine)


@pytest.mark.parametrize("name", sorted(SEVERAL_EVENTS))
@pytest.mark.parametrize("wrong", [None, 3, torch.nn.Linear(1, 1)], ids=lambda wrong: type(wrong).__name__)
def test_what_is_no_engine_cannot_be_attached_to(name: str, wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"{name}\.attach\(\) takes an Engine, but got"):
        all_handlers(tmp_path)[name].attach(wrong)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: EMA(torch.nn.Linear(1, 1), momentum=0.1), "decay="),  # type: ignore[call-arg]
        (lambda: EarlyStopping(3, lambda engine: 1.0, Engine(nothing), threshold=0.1), "min_delta="),  # type: ignore[call-arg]
        (lambda: EarlyStopping(3, lambda engine: 1.0, Engine(nothing), cumulative=True), "cumulative_delta="),  # type: ignore[call-arg]
        (lambda: Checkpoint({"m": torch.nn.Linear(1, 1)}, dirname="x"), "save_dir="),  # type: ignore[call-arg]
        (lambda: TimeLimit(limit_sec=3), "seconds="),  # type: ignore[call-arg]
        (lambda: ProgressBar(metric_names="all"), r"\.attach\(engine, metric_names="),  # type: ignore[call-arg]
        (lambda: ProgressBar(output_transform=float), r"\.attach\(engine, output_transform="),  # type: ignore[call-arg]
    ],
)
def test_keywords_of_another_library_are_translated(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        make()


def test_names_of_another_library_are_translated(tmp_path: Path) -> None:
    found = all_handlers(tmp_path)
    with pytest.raises(AttributeError, match="last_path"):
        found["Checkpoint"].last_checkpoint  # noqa: B018
    with pytest.raises(AttributeError, match="resume"):
        Checkpoint.load_objects  # type: ignore[attr-defined]  # noqa: B018


# -- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda f: TrackingHandler(Log(), output_transform=f), r"output_transform\(output\)"),
        (lambda f: ProgressBar().attach(Engine(nothing), output_transform=f), r"output_transform\(output\)"),
        (lambda f: TerminateOnNan(output_transform=f), r"output_transform\(output\)"),
        (lambda f: ThroughputMonitor(num_samples=f), r"num_samples\(engine\)"),
        (lambda f: ThroughputMonitor(num_tokens=f), r"num_tokens\(engine\)"),
        (lambda f: EarlyStopping(3, f, Engine(nothing)), r"score_function\(engine\)"),
        (lambda f: Checkpoint({"m": torch.nn.Linear(1, 1)}, "x", score_function=f), r"score_function\(engine\)"),
        (lambda f: Checkpoint({"m": torch.nn.Linear(1, 1)}, "x", global_step_transform=f), r"\(engine, event\)"),
        (lambda f: TrackingHandler(Log(), "all", global_step_transform=f), r"\(engine, event\)"),
    ],
)
@pytest.mark.parametrize("wrong", [lambda: 1, lambda a, b, c: 1, 3, "loss"], ids=["none", "three", "number", "text"])
def test_a_function_that_cannot_be_called_as_it_will_be_is_refused_at_once(
    make: Callable[[Any], Any], named: str, wrong: Any
) -> None:
    with pytest.raises(TypeError, match=named):
        make(wrong)


# -- what is shown and logged ----------------------------------------------------------------------------------------


def bar_text(capsys: pytest.CaptureFixture[str], output: Any = 1, metrics: Any = None, **options: Any) -> str:
    engine = Engine(lambda engine, batch: output)
    for name, value in (metrics or {}).items():
        engine.add_metric(Value(value), name)
    ProgressBar().attach(engine, **options)
    engine.run([0])
    return capsys.readouterr().err


def test_a_bar_shows_all_metrics_that_are_numbers_besides_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"acc": 0.5, "f1": torch.tensor(0.25), "matrix": torch.zeros(2, 2)}
    text = bar_text(
        capsys, {"loss": 2.0}, metrics, metric_names="all", output_transform=lambda o: {"batch_loss": o["loss"]}
    )
    for part in ("acc=0.5", "f1=0.25", "batch_loss=2"):
        assert part in text
    assert "matrix" not in text


def test_a_bar_of_all_metrics_of_an_engine_without_any_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert "1/1" in bar_text(capsys, metric_names="all")


def test_a_bar_of_all_shows_what_a_handler_puts_among_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(nothing)
    ProgressBar().attach(engine, metric_names="all")
    engine.on(Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(val=0.75), priority=2000)
    engine.run([0])
    assert "val=0.75" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), np.array([0.5]), torch.tensor([[0.5]]), 0.5])
def test_a_bar_shows_a_number_of_any_kind(capsys: pytest.CaptureFixture[str], value: Any) -> None:
    assert "output=0.5" in bar_text(capsys, value, output_transform=lambda o: o)


@pytest.mark.parametrize("value", [None, (1, 2), "loss", torch.zeros(3), 1j], ids=lambda value: type(value).__name__)
def test_a_bar_says_what_a_transform_gave_that_is_no_number(capsys: pytest.CaptureFixture[str], value: Any) -> None:
    with pytest.raises(TypeError, match=f"output_transform gave a {type(value).__qualname__}, but must give a number"):
        bar_text(capsys, value, output_transform=lambda o: o)


@pytest.mark.parametrize("wrong", [3, ["acc", 3], "acc", {"acc": 1}.values()])
def test_names_that_are_no_names_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="metric_names=.* must be a list of names"):
        ProgressBar().attach(Engine(nothing), metric_names=wrong)
    with pytest.raises(TypeError, match="metric_names=.* must be a list of names"):
        TrackingHandler(Log(), wrong)


def test_a_value_that_is_computed_when_it_is_asked_for_is_read_when_it_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Live(dict[str, Any]):
        """As metrics that are live: the present value is made by the look-up."""

        def __getitem__(self, name: str) -> Any:
            return super().__getitem__(name)()

    engine, log, now = Engine(nothing), Log(), [0.0]

    @engine.on(Events.STARTED)
    def begin(engine: Engine) -> None:
        engine.state.metrics = Live(average=lambda: now[0], other=lambda: 1 / 0)

    @engine.on(Events.ITERATION_COMPLETED)
    def count(engine: Engine) -> None:
        now[0] += 1.5

    engine.on(Events.ITERATION_COMPLETED, TrackingHandler(log, ["average"]))
    engine.run([0, 0], max_iterations=2, epoch_length=3)
    assert [row["average"] for row in log.rows] == [1.5, 3.0]


# -- a schedule ------------------------------------------------------------------------------------------------------


def plateau(**options: Any) -> LRScheduler:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return LRScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), **options)


def test_a_plateau_whose_metric_is_not_computed_yet_says_when_it_will_be() -> None:
    trainer = Engine(nothing)
    trainer.add_metric(Value(1.0), "loss")
    trainer.on(Events.ITERATION_COMPLETED, plateau(metric_name="loss"))
    with pytest.raises(KeyError, match=r"'loss'.* not computed yet.*EPOCH_COMPLETED"):
        trainer.run([0])


def test_a_plateau_whose_evaluator_has_not_run_yet_says_so() -> None:
    trainer, evaluator = Engine(nothing), Engine(nothing)
    evaluator.add_metric(Value(1.0), "loss")
    trainer.on(Events.EPOCH_COMPLETED, plateau(metric_name="loss", metric_engine=evaluator))
    with pytest.raises(KeyError, match="not computed yet.*after the evaluation"):
        trainer.run([0])


def test_the_name_of_a_plateaus_metric_is_a_name() -> None:
    with pytest.raises(TypeError, match="metric_name=3"):
        plateau(metric_name=3)


# -- supervised engines ----------------------------------------------------------------------------------------------


def supervised(**options: Any) -> Engine:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss, **options)


BATCHES = [(torch.zeros(2, 2), torch.zeros(2, 1))] * 2


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (None, "a NoneType"),
        ("3", "a str"),
        ([1], "a list of 1"),
        (torch.ones(2), r"a Tensor of shape \(2,\)"),
        (True, "a bool"),
        ({"n": 1}, "a dict of 1"),
    ],
)
def test_a_weight_that_is_no_number_is_named(count: Any, told: str) -> None:
    trainer = supervised(weight=lambda inputs, targets: count, gradient_accumulation_steps=2)
    with pytest.raises(TypeError, match=f"weight gave {told}"):
        trainer.run(BATCHES)


@pytest.mark.parametrize("count", [2, 2.0, np.int64(2), np.float32(2), torch.tensor(2), torch.tensor(2.0)])
def test_a_weight_that_is_a_number_of_any_kind_is_taken(count: Any) -> None:
    trainer = supervised(weight=lambda inputs, targets: count, gradient_accumulation_steps=2)
    assert trainer.run(BATCHES).iteration == 2


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (None, "a NoneType"),
        ((1, 2, 3), "a tuple of 3"),
        (torch.zeros(2, 2), r"a Tensor of shape \(2, 2\)"),  # which could be unpacked
        ({"x": 1, "y": 2}, "a dict of 2"),  # so could its keys
        ("xy", "a str of 2"),
    ],
)
def test_a_prepare_batch_that_gives_no_pair_is_named(pair: Any, told: str) -> None:
    for engine in (
        supervised(prepare_batch=lambda batch, device: pair),
        create_supervised_evaluator(torch.nn.Linear(2, 1), prepare_batch=lambda batch, device: pair),
    ):
        with pytest.raises(TypeError, match=f"prepare_batch gave {told}"):
            engine.run(BATCHES)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("prepare_batch", "batch, device"),
        ("model_fn", "model, inputs"),
        ("weight", "inputs, targets"),
        ("output_transform", "inputs, targets, pred, loss"),
    ],
)
def test_a_function_of_a_trainer_that_cannot_be_called_is_refused_when_it_is_made(name: str, called: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}=.* cannot be called as {name}\({called}\)"):
        supervised(**{name: lambda one: one})


def test_a_loss_with_another_signature_is_refused_when_the_trainer_is_made() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"loss_fn=.* cannot be called as loss_fn\(pred, targets\)"):
        create_supervised_trainer(model, optimizer, lambda pred: pred.mean())  # type: ignore[arg-type]


def test_a_bar_and_a_tracker_of_each_iteration_show_the_present_average_never_the_last_epochs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dengine.handlers import progress_bar
    from dengine.metrics import Average, RunningAverage

    monkeypatch.setattr(progress_bar, "_LINE_S", 0.0)  # a line for each iteration
    trainer, named, every = Engine(lambda engine, batch: batch), Log(), Log()
    trainer.add_metrics({"running": RunningAverage(alpha=0.5), "mean": Average()})
    trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(named, ["running"]))
    trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(every, "all"))
    ProgressBar().attach(trainer, metric_names=["running"])
    trainer.run([1.0, 3.0], max_epochs=2)
    assert [row["running"] for row in named.rows] == [1.0, 2.0, 1.0, 2.0]
    assert [row["running"] for row in every.rows] == [1.0, 2.0, 1.0, 2.0]
    lines = [line for line in capsys.readouterr().err.splitlines() if "1/2 " in line]
    assert lines
    assert all("running=1" in line for line in lines)
