"""What `engine.state.metrics` shows while an epoch is under way is of this epoch, and a dict all the same."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics

from dengine import Engine, Events, NotComputableError
from dengine.handlers import Checkpoint, ProgressBar, TrackingHandler
from dengine.metrics import (
    Accuracy,
    Average,
    ConfusionMatrix,
    DistributedMetric,
    MetricFunction,
    RunningAverage,
    Throughput,
)


def trainer_with(**metrics: Any) -> Engine:
    trainer = Engine(lambda engine, batch: batch)
    trainer.add_metrics(metrics)
    return trainer


class Sink:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append(values)


LOSSES = [[2.0, 4.0, 6.0], [11.0, 12.0, 13.0]]


def each_epoch(trainer: Engine) -> list[Any]:
    """Data that differ from epoch to epoch."""
    data: list[float] = []

    @trainer.on(Events.EPOCH_STARTED, priority=9)
    def change(engine: Engine) -> None:
        data[:] = LOSSES[engine.state.epoch]

    data[:] = LOSSES[0]
    return data


def running(values: list[float], alpha: float) -> list[float]:
    averages = [values[0]]
    for value in values[1:]:
        averages.append(alpha * averages[-1] + (1 - alpha) * value)
    return averages


@pytest.mark.parametrize(
    "around", [lambda m: m, lambda m: 1.0 * m, DistributedMetric, lambda m: MetricFunction(abs, m)]
)
def test_a_row_per_iteration_never_holds_the_last_epochs_value(around: Callable[[Any], Any]) -> None:
    trainer, sink = trainer_with(loss=around(RunningAverage(alpha=0.5)), mean=Average()), Sink()
    trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(sink, ["loss"]))
    trainer.on(Events.EPOCH_COMPLETED, TrackingHandler(sink, "all"))
    trainer.run(each_epoch(trainer), max_epochs=2)
    first, second = (running(losses, 0.5) for losses in LOSSES)
    rows = [{"loss": value} for value in first] + [{"loss": first[-1], "mean": 4.0}]
    rows += [{"loss": value} for value in second] + [{"loss": second[-1], "mean": 12.0}]
    assert sink.rows == rows


def test_a_bar_shows_the_present_value(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(loss=RunningAverage(alpha=0.0))
    bar = ProgressBar()
    bar.attach(trainer, ["loss"])
    monkeypatch.setattr("dengine.handlers.progress_bar._LINE_S", -1.0)
    trainer.run(each_epoch(trainer), max_epochs=2)
    lines = capsys.readouterr().err.splitlines()
    shown = [line.rpartition("loss=")[2].rstrip("] ") for line in lines if "loss=" in line]
    assert list(dict.fromkeys(shown)) == ["2", "4", "6", "11", "12", "13"]


@pytest.mark.parametrize("event", list(Events))
def test_a_handler_of_any_event_sees_the_present_value_or_none(event: Events) -> None:
    trainer, seen = trainer_with(loss=RunningAverage(alpha=0.0)), []
    trainer.on(event, lambda engine: seen.append(engine.state.metrics.get("loss")))
    trainer.run(each_epoch(trainer), max_epochs=2)
    trainer.run(each_epoch(trainer))
    both = {
        Events.ITERATION_COMPLETED: [2.0, 4.0, 6.0, 11.0, 12.0, 13.0, 2.0, 4.0, 6.0],
        Events.ITERATION_STARTED: [None, 2.0, 4.0, None, 11.0, 12.0, None, 2.0, 4.0],
        Events.EPOCH_STARTED: [None, None, None],
        Events.EPOCH_COMPLETED: [6.0, 13.0, 6.0],
        Events.STARTED: [None, None],
        Events.COMPLETED: [13.0, 6.0],
    }
    if event in both:
        assert seen == both[event]


def test_nothing_is_computed_unless_somebody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compute = RunningAverage.compute
    monkeypatch.setattr(RunningAverage, "compute", lambda self: (calls.append(self), compute(self))[1])
    trainer = trainer_with(loss=RunningAverage(), mean=Average())

    @trainer.on(Events.ITERATION_COMPLETED)
    def look(engine: Engine) -> None:
        metrics = engine.state.metrics
        metrics["other"] = 1.0
        assert metrics["other"] == metrics.get("other") == 1.0
        assert list(metrics) == ["loss", "other"]
        assert len(metrics) == 2
        assert "loss" in metrics
        assert "mean" not in metrics
        assert "loss" in repr(engine.state)

    trainer.run([1.0, 2.0])
    assert len(calls) == 1  # at the epoch's end


def test_a_resumed_run_shows_what_the_uninterrupted_one_shows(tmp_path: Any) -> None:
    rows = []
    for resumed in (None, False, True):
        trainer = trainer_with(loss=RunningAverage(alpha=0.5), speed=Throughput(lambda _: 1))
        seen: list[Any] = []
        trainer.on(Events.ITERATION_STARTED, lambda engine, seen=seen: seen.append(engine.state.metrics.get("loss")))
        trainer.on(Events.ITERATION_STARTED, lambda engine: engine.state.metrics.get("speed"))
        if resumed is False:
            trainer.on(Events.ITERATION_COMPLETED(once=2), Checkpoint({"trainer": trainer}, tmp_path))
            trainer.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate(), priority=-1)
        if resumed:
            Checkpoint.resume(tmp_path, {"trainer": trainer})
        trainer.run([1.0, 3.0, 5.0, 7.0])
        rows.append((seen, trainer.state.metrics["loss"]))
    whole, cut, rest = rows
    assert cut[0] + rest[0] == whole[0]
    assert rest[1] == whole[1]
    assert cut == (whole[0][:2], 2.0)  # where it was left


def test_what_is_kept_of_a_run_does_not_change_with_the_next_one() -> None:
    trainer = trainer_with(loss=RunningAverage(alpha=0.0))
    first = trainer.run([1.0, 2.0]).metrics
    trainer.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
    second = trainer.run([3.0, 4.0, 5.0]).metrics
    third = trainer.run([6.0]).metrics
    assert (first, second, third) == ({"loss": 2.0}, {"loss": 4.0}, {"loss": 6.0})


def test_after_a_failure_nothing_is_read_from_a_device() -> None:
    class Fails(RunningAverage):
        def live_value(self) -> Any:
            raise AssertionError("read")

    trainer = trainer_with(loss=Fails())
    trainer.on(Events.ITERATION_COMPLETED(once=2), lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run([1.0, 2.0, 3.0])
    assert trainer.state.metrics == {}


def test_an_epoch_without_an_iteration_shows_no_old_value() -> None:
    trainer, seen = trainer_with(loss=RunningAverage()), []
    trainer.on(Events.EPOCH_STARTED, lambda engine: engine.terminate_epoch() if engine.state.epoch == 1 else None)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)))
    trainer.run([1.0], max_epochs=3)
    assert seen == [{"loss": 1.0}, {}, {"loss": 1.0}]


def test_the_speed_is_that_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dengine.metrics.builtin.throughput.perf_counter", lambda: now[0])
    trainer, seen = trainer_with(speed=Throughput()), []

    @trainer.on(Events.ITERATION_COMPLETED)
    def look(engine: Engine) -> None:
        now[0] += 2.0
        seen.append((engine.state.metrics["speed"], engine.state.metrics["speed"]))

    values = trainer.run([torch.zeros(4), torch.zeros(8)]).metrics
    assert seen == [(2.0, 2.0), (3.0, 3.0)]
    assert values == {"speed": 3.0}


def test_a_mapping_of_running_averages_is_live_under_its_keys() -> None:
    both = MetricFunction(lambda a: {"x": a, "y": {"z": 2 * a}}, RunningAverage(alpha=0.0))
    trainer, seen = trainer_with(m=both, last=Average()), list[Any]()
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)))
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.metrics["m/y/z"]))
    values = trainer.run([1.0, 2.0], max_epochs=2).metrics
    assert seen[:4] == [{"m/x": 1.0, "m/y/z": 2.0}, 2.0, {"m/x": 2.0, "m/y/z": 4.0}, 4.0]
    assert seen[4] == {"m/x": 1.0, "m/y/z": 2.0, "last": 1.5}
    assert values == {"m/x": 2.0, "m/y/z": 4.0, "last": 1.5}


# -- it is a dict --------------------------------------------------------------------------------------------------


def live_dict(use: Callable[[dict[str, Any]], Any]) -> Any:
    """What `use` gives in the first iteration, where there is {"loss": 3.0, "own": 1.0}."""
    trainer, found = trainer_with(loss=RunningAverage(), mean=Average()), []
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.update(own=1.0))
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: found.append(use(engine.state.metrics)))
    trainer.run([3.0])
    return found[0]


def saved(metrics: Any) -> Any:
    buffer = io.BytesIO()
    torch.save({"metrics": metrics}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)["metrics"]


WAYS: list[Callable[[Any], Any]] = [
    dict,
    copy.copy,
    copy.deepcopy,
    saved,
    lambda m: {**m},
    lambda m: dict(**m),
    lambda m: m.copy(),
    lambda m: m | {},
    lambda m: {} | m,
    lambda m: dict(m.items()),
    lambda m: dict(zip(m.keys(), m.values(), strict=True)),
    lambda m: dict(zip(list(m), [m[key] for key in m], strict=True)),
    lambda m: dict(reversed([(key, m.get(key)) for key in reversed(m)])),
    lambda m: json.loads(json.dumps(m)),
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: eval(repr(m)),
    lambda m: dict([m.popitem(), ("loss", m.pop("loss"))]),
    lambda m: {"loss": m.setdefault("loss", 5.0), "own": m.setdefault("own", 5.0)},
    lambda m: (lambda into: (into.update(m), into)[1])({}),
]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_read_it_gives_the_present_values_and_a_plain_dict(way: Callable[[Any], Any]) -> None:
    found = live_dict(way)
    assert found == {"loss": 3.0, "own": 1.0}
    assert type(found).__name__ in ("dict", "OrderedDict")


def test_it_is_a_dict_with_a_length_and_equality() -> None:
    def use(metrics: Any) -> Any:
        assert isinstance(metrics, dict)
        assert len(metrics) == 2
        assert metrics
        assert metrics == {"loss": 3.0, "own": 1.0} == metrics
        assert metrics != {}
        assert metrics.pop("none", None) is None
        assert metrics.get("mean", 7) == 7
        metrics["loss"] = 5.0
        assert metrics["loss"] == 5.0
        del metrics["own"]
        metrics |= {"x": 1.0}
        assert metrics == {"loss": 5.0, "x": 1.0}
        metrics.clear()
        return not metrics

    assert live_dict(use)
    trainer = trainer_with(loss=RunningAverage())
    assert trainer.state.metrics == {}
    trainer.state.metrics = {"mine": 1.0}
    trainer.on(Events.EPOCH_STARTED, lambda engine: setattr(engine.state, "metrics", {"mine": 1.0}))
    assert trainer.run([1.0]).metrics == {"mine": 1.0, "loss": 1.0}


def test_metrics_may_be_persisted() -> None:
    trainer = trainer_with(loss=RunningAverage())
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: setattr(engine.state, "best", engine.state.metrics))
    trainer.state.best = {}
    trainer.state.persist("best")
    trainer.run([1.0])
    assert trainer.state_dict()["persisted"]["best"] == {"loss": 1.0}
    assert type(trainer.state_dict()["persisted"]["best"]) is dict


def test_an_unknown_name_lists_what_there_is() -> None:
    trainer = trainer_with(loss=RunningAverage(), acc=Average())
    for read in (lambda m: m["los"], lambda m: m.pop("los"), lambda m: m.__delitem__("los")):
        with pytest.raises(KeyError, match=r"no metric 'los' .* none"):
            read(trainer.state.metrics)
        trainer.run([1.0])
        with pytest.raises(KeyError, match=r"no metric 'los' .* 'loss', 'acc'"):
            read(trainer.state.metrics)
        trainer.state.metrics.clear()


# -- of another metric ---------------------------------------------------------------------------------------------


def pairs(*right: int) -> list[Any]:
    """Batches of four of which so many are right."""
    return [(torch.zeros(4, dtype=torch.long), torch.arange(4) >= number) for number in right]


@pytest.mark.parametrize(
    "make",
    [
        Accuracy,
        lambda: DistributedMetric(Accuracy()),
        lambda: 1.0 * Accuracy(),
        lambda: torchmetrics.classification.BinaryAccuracy(),
        lambda: RunningAverage(metric=Accuracy(), alpha=0.0),
    ],
)
def test_the_value_of_each_batch_is_averaged(make: Any) -> None:
    trainer, seen = trainer_with(smooth=RunningAverage(0.5, metric=make())), []
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.metrics["smooth"]))
    values = trainer.run(pairs(4, 0, 2), max_epochs=2).metrics
    assert seen == [1.0, 0.5, 0.5] * 2
    assert values == {"smooth": 0.5}


def test_tensors_are_averaged_element_by_element_over_ranks_too(over_ranks: Any) -> None:
    def metrics() -> dict[str, Any]:
        return {"matrix": RunningAverage(0.5, metric=ConfusionMatrix(num_classes=2))}

    values = over_ranks(metrics, [pairs(4, 0), [], pairs(4)]).values
    assert values["matrix"].tolist() == [[(2 + 4) / 2, 0], [(2 + 0) / 2, 0]]
    outcomes = over_ranks(metrics, [[], []]).outcomes
    assert all(isinstance(outcome, NotComputableError) for outcome in outcomes)


def test_the_metrics_own_transform_is_used_and_given_once() -> None:
    inner = Accuracy(output_transform=lambda output: output["pair"])
    trainer = trainer_with(smooth=RunningAverage(metric=inner))
    assert trainer.run([{"pair": pairs(4)[0]}]).metrics == {"smooth": 1.0}
    with pytest.raises(ValueError, match="one place"):
        RunningAverage(metric=Accuracy(output_transform=abs), output_transform=abs)
    with pytest.raises(ValueError, match="one place"):
        Engine(lambda engine, batch: batch).add_metric(
            RunningAverage(metric=Accuracy(output_transform=abs)), "m", output_transform=abs
        )
    given = RunningAverage(metric=Accuracy(), output_transform=lambda output: output["pair"])
    assert trainer_with(smooth=given).run([{"pair": pairs(4)[0]}]).metrics == {"smooth": 1.0}


def test_what_cannot_be_averaged_is_refused() -> None:
    metric: Any
    for metric in (3, Accuracy, torchmetrics.MetricTracker(torchmetrics.MeanMetric(), maximize=True)):
        with pytest.raises(TypeError, match="metric="):
            RunningAverage(metric=metric)
    several = MetricFunction(lambda value: {"a": value}, Average())
    with pytest.raises(TypeError, match="MetricFunction computed a dict"):
        trainer_with(m=RunningAverage(metric=several)).run([1.0])
    accuracy = Accuracy()
    with pytest.raises(ValueError, match="twice"):
        trainer_with(smooth=RunningAverage(metric=accuracy), acc=accuracy)
