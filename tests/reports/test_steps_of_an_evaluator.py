"""What is logged of an evaluation stands at the step of its trainer, and a short trial run warns of nothing."""

import warnings
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import ParamGroupLogger, TrackingHandler
from dengine.metrics import Average


class Rows:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values))


def evaluator_of(rows: Rows, event: Any, **options: Any) -> Engine:
    evaluator = Engine(lambda engine, batch: float(batch))
    evaluator.add_metric(Average(), "value")
    evaluator.on(event, TrackingHandler(rows, metric_names="all", **options))
    return evaluator


@pytest.mark.parametrize("event", [Events.EPOCH_COMPLETED, Events.COMPLETED])
def test_a_row_of_an_evaluator_stands_at_the_step_of_its_trainer(event: Events) -> None:
    rows = Rows()
    evaluator = evaluator_of(rows, event)
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1, 2, 3]))
    trainer.run(range(4), max_epochs=3)
    assert rows.rows == [(step, {"value": 2.0}) for step in (4, 8, 12)]


def test_learning_rates_logged_by_an_evaluator_too() -> None:
    rows, evaluator, trainer = Rows(), Engine(lambda engine, batch: batch), Engine(lambda engine, batch: batch)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    evaluator.on(Events.COMPLETED, ParamGroupLogger(optimizer, rows))
    trainer.on(Events.ITERATION_COMPLETED(every=2), lambda engine: evaluator.run([1, 2, 3]))
    trainer.run(range(4))
    assert [step for step, _ in rows.rows] == [2, 4]


def test_a_row_of_each_batch_of_an_evaluator_keeps_its_own_step() -> None:
    rows = Rows()
    evaluator = evaluator_of(rows, Events.ITERATION_COMPLETED, output_transform=lambda output: {"now": output})
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1, 2, 3]))
    trainer.run(range(4))
    assert [step for step, _ in rows.rows] == [1, 2, 3]


def test_alone_or_with_a_transform_nothing_else_decides() -> None:
    rows = Rows()
    evaluator_of(rows, Events.COMPLETED).run([1, 2, 3])
    evaluator = evaluator_of(rows, Events.COMPLETED, global_step_transform=lambda engine, event: 77)
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1, 2, 3]))
    trainer.run(range(4))
    assert [step for step, _ in rows.rows] == [3, 77]


@pytest.mark.parametrize(
    "options",
    [{"max_epochs": 2}, {"max_iterations": 3}, {"max_iterations": 400}, {"epoch_length": 3}],
    ids=str,
)
def test_a_short_trial_of_a_training_does_not_warn_of_what_a_longer_one_would_call(options: dict[str, Any]) -> None:
    trainer = Engine(lambda engine, batch: batch)
    for event in (Events.ITERATION_COMPLETED(every=1000), Events.EPOCH_COMPLETED(every=5), Events.STARTED(after=3)):
        trainer.on(event, lambda engine: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run(range(4), **options)


def test_an_evaluator_inside_a_trainer_is_told_of_however_short_it_is() -> None:
    trainer, evaluator = Engine(lambda engine, batch: batch), Engine(lambda engine, batch: batch)
    evaluator.on(Events.EPOCH_COMPLETED(every=5), lambda engine: None)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(range(9), epoch_length=3))
    with pytest.warns(RuntimeWarning, match=r"EPOCH_COMPLETED\(every=5\), which came 1x") as caught:
        trainer.run(range(4), max_epochs=2)
    assert len(caught) == 1
