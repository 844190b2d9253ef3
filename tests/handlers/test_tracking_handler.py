"""What reaches a run, from an engine, at which step, and into whose objects."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import TrackingHandler
from dengine.metrics import Accuracy, Average, ConfusionMatrix, F1Score
from dengine.tracking import Track


class Log:
    """As a wandb run."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values))


class Writer:
    """As a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))


class Mlflow:
    """As the module."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))


def output(engine: Engine, batch: int) -> dict[str, Any]:
    return {"loss": torch.tensor(batch / 2), "pred": torch.zeros(4, 3), "phase": "warm-up"}


def test_the_seed_s_way(tmp_path: Path) -> None:
    trainer = Engine(lambda engine, batch: {"loss": batch, "acc": 1.0})
    with Track.run(project="p", dir=tmp_path) as run:
        handler = TrackingHandler(
            run=run,
            metric_names=["loss", "acc"],
            output_transform=lambda x: x,
            global_step_transform=lambda engine, event: engine.state.iteration,
        )
        trainer.on(Events.ITERATION_COMPLETED(every=10), handler)
        trainer.run(range(25), max_epochs=2)
    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["acc"]) for row in rows] == [
        (10, 9, 1.0), (20, 19, 1.0), (30, 4, 1.0), (40, 14, 1.0), (50, 24, 1.0),
    ]  # fmt: skip


def test_a_name_that_is_not_there_lists_those_that_are() -> None:
    trainer = Engine(output)
    trainer.add_metric(Accuracy(output_transform=lambda o: (torch.ones(1), torch.ones(1))), "acc")
    handler = TrackingHandler(Log(), metric_names=["los"], output_transform=lambda o: o)
    trainer.on(Events.ITERATION_COMPLETED, handler)
    with pytest.raises(KeyError, match="log 'los', but there is 'loss', 'pred', 'phase', 'acc'"):
        trainer.run([1])


def test_a_metric_that_is_computed_later_is_left_out_until_then() -> None:
    trainer, log = Engine(output), Log()
    trainer.add_metric(Accuracy(output_transform=lambda o: (torch.ones(1), torch.ones(1))), "acc")
    handler = TrackingHandler(log, metric_names=["loss", "acc"], output_transform=lambda o: o)
    trainer.on(Events.ITERATION_COMPLETED, handler)
    trainer.run([1], max_epochs=2)
    assert log.rows == [(1, {"loss": 0.5}), (2, {"loss": 0.5, "acc": 1.0})]


def test_all_takes_every_metric_vectors_by_their_entries_and_no_matrix() -> None:
    evaluator, log = Engine(lambda engine, batch: (torch.tensor([0, 1]), torch.tensor([0, 0]))), Log()
    evaluator.add_metrics(
        {
            "acc": Accuracy(),
            "f1": F1Score(num_classes=2, average=None),
            "confusion": ConfusionMatrix(num_classes=2),
        }
    )
    evaluator.on(Events.EPOCH_COMPLETED, TrackingHandler(log, "all", global_step_transform=lambda engine, event: 7))
    evaluator.run([0])
    ((step, row),) = log.rows
    assert step == 7
    assert row == pytest.approx({"acc": 0.5, "f1/0": 2 / 3, "f1/1": 0.0})


def test_of_a_whole_output_only_scalars_are_logged_but_what_is_named_must_be_one() -> None:
    trainer, log = Engine(output), Log()
    trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(log, output_transform=lambda o: o))
    trainer.run([1])
    assert log.rows == [(1, {"loss": 0.5, "phase": "warm-up"})]
    trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(log, ["pred"], output_transform=lambda o: o))
    with pytest.raises(TypeError, match=r"'pred' is a tensor of shape \(4, 3\)"):
        trainer.run([1])


def test_a_bare_number_is_called_output_and_anything_else_is_refused() -> None:
    trainer, log = Engine(lambda engine, batch: batch), Log()
    trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(log, output_transform=lambda o: o))
    trainer.run([3])
    assert log.rows == [(1, {"output": 3})]
    with pytest.raises(TypeError, match="output_transform gave a tuple"):
        trainer.run([(1, 2)])


def test_writers_and_mlflow_get_numbers_only() -> None:
    trainer, writer, mlflow = Engine(output), Writer(), Mlflow()
    for run in (writer, mlflow):
        trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(run, output_transform=lambda o: o))
    trainer.run([1])
    assert writer.scalars == [("loss", 0.5, 1)]
    assert mlflow.rows == [(1, {"loss": 0.5})]


def test_the_transform_of_the_step_gets_the_event() -> None:
    trainer, log, seen = Engine(output), Log(), []

    def step(engine: Engine, event: Any) -> int:
        seen.append(event)
        return engine.state.epoch

    trainer.on(Events.EPOCH_COMPLETED, TrackingHandler(log, None, lambda o: o, step))
    trainer.run([1], max_epochs=2)
    assert seen == [Events.EPOCH_COMPLETED] * 2
    assert [step for step, _ in log.rows] == [0, 1]


def test_no_value_is_read_in_an_iteration_in_which_nothing_is_logged() -> None:
    class Value(torch.Tensor):
        reads = 0

        def item(self) -> Any:
            Value.reads += 1
            return super().item()

    trainer = Engine(lambda engine, batch: {"loss": torch.zeros(()).as_subclass(Value)})
    trainer.on(Events.ITERATION_COMPLETED(every=100), TrackingHandler(Log(), ["loss"], lambda o: o))
    trainer.run(range(1000))
    assert Value.reads == 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric_names": "loss"}, TypeError, r"""must be a list of names, \['loss'\], or "all\""""),
        ({}, ValueError, "There is nothing to log"),
        ({"run": object(), "metric_names": "all"}, TypeError, "cannot be logged to: pass a run of Track.run"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrackingHandler(**{"run": Log(), **arguments})


@pytest.mark.parametrize("names", ["all", ["loss"]])
def test_a_metric_and_an_output_of_one_name_are_refused_before_either_is_lost(names: Any) -> None:
    trainer = Engine(lambda engine, batch: 1.0)
    trainer.add_metric(Average(), "loss")
    log = TrackingHandler(Log(), names, output_transform=lambda output: {"loss": output})
    trainer.on(Events.ITERATION_COMPLETED, log)
    with pytest.raises(ValueError, match="'loss' is a metric of the engine and in what output_transform gives"):
        trainer.run([0])


@pytest.mark.parametrize("name", ["output_transform", "global_step_transform"])
def test_a_transform_that_cannot_be_called_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}=3 must be callable"):
        TrackingHandler(Log(), "all", **{name: 3})  # type: ignore[arg-type]
