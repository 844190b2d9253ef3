"""The learning rate after each epoch, known from torch's own stepping by hand."""

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from dengine import Engine, Events
from dengine.handlers import LRScheduler


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(handler: LRScheduler, sgd: torch.optim.Optimizer, num_epochs: int, metrics: list[float] | None = None) -> Any:
    trainer = Engine(lambda engine, batch: sgd.step())
    found: list[float] = []
    if metrics is not None:
        trainer.on(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(loss=metrics[e.state.epoch]))
    trainer.on(Events.EPOCH_COMPLETED, handler)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: found.append(sgd.param_groups[0]["lr"]))
    trainer.run([0], max_epochs=num_epochs)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda sgd: lr_scheduler.StepLR(sgd, 2, 0.1),
        lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, 5),
        lambda sgd: lr_scheduler.LambdaLR(sgd, lambda epoch: 0.5**epoch),
        lambda sgd: lr_scheduler.OneCycleLR(sgd, max_lr=2.0, total_steps=8),
        lambda sgd: lr_scheduler.SequentialLR(
            sgd, [lr_scheduler.LinearLR(sgd, 0.1, total_iters=3), lr_scheduler.ExponentialLR(sgd, 0.9)], [3]
        ),
    ],
)
def test_every_schedule_steps_as_by_hand(make: Any) -> None:
    sgd, by_hand = optimizer(), optimizer()
    schedule = make(by_hand)
    expected = []
    for _ in range(6):
        by_hand.step()
        schedule.step()
        expected.append(by_hand.param_groups[0]["lr"])
    assert rates(LRScheduler(make(sgd)), sgd, 6) == expected


def test_a_plateau_reads_the_metric_of_its_own_or_of_another_engine() -> None:
    sgd = optimizer()
    plateau = LRScheduler(lr_scheduler.ReduceLROnPlateau(sgd, patience=0), "loss")
    assert rates(plateau, sgd, 4, [3.0, 2.0, 2.0, 1.0]) == pytest.approx([1.0, 1.0, 0.1, 0.1])
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.state.metrics["acc"] = 0.5
    sgd = optimizer()
    other = LRScheduler(lr_scheduler.ReduceLROnPlateau(sgd, mode="max", patience=0), "acc", evaluator)
    assert rates(other, sgd, 2) == pytest.approx([1.0, 0.1])


def test_a_metric_that_is_not_there_lists_those_that_are() -> None:
    sgd = optimizer()
    with pytest.raises(KeyError, match="waits for the metric 'acc', but the engine has 'loss'"):
        rates(LRScheduler(lr_scheduler.ReduceLROnPlateau(sgd), "acc"), sgd, 1, [0.0])


def test_its_state_is_the_schedules() -> None:
    sgd, other = optimizer(), optimizer()
    handler = LRScheduler(lr_scheduler.StepLR(sgd, 2, 0.1))
    rates(handler, sgd, 3)
    resumed = LRScheduler(lr_scheduler.StepLR(other, 2, 0.1))
    resumed.load_state_dict(handler.state_dict())
    other.param_groups[0]["lr"] = sgd.param_groups[0]["lr"]
    assert rates(resumed, other, 1) == pytest.approx([0.01])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda sgd: (lr_scheduler.ReduceLROnPlateau(sgd),), ValueError, "pass metric_name="),
        (lambda sgd: (lr_scheduler.StepLR(sgd, 1), "loss"), ValueError, "StepLR takes no metric"),
        (lambda sgd: (sgd,), TypeError, "takes a scheduler of torch.optim.lr_scheduler"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LRScheduler(*arguments(optimizer()))
