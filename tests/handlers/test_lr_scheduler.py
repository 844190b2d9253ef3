"""The learning rate after each epoch, known from torch's own stepping by hand."""

import copy
from pathlib import Path
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


SCHEDULES: dict[str, Any] = {
    "step": lambda sgd: lr_scheduler.StepLR(sgd, 2, 0.1),
    "multistep": lambda sgd: lr_scheduler.MultiStepLR(sgd, [1, 4], 0.1),
    "constant": lambda sgd: lr_scheduler.ConstantLR(sgd, total_iters=3),
    "linear": lambda sgd: lr_scheduler.LinearLR(sgd, total_iters=4),
    "exponential": lambda sgd: lr_scheduler.ExponentialLR(sgd, 0.9),
    "polynomial": lambda sgd: lr_scheduler.PolynomialLR(sgd, 5),
    "cosine": lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, 5),
    "restarts": lambda sgd: lr_scheduler.CosineAnnealingWarmRestarts(sgd, 4),
    "lambda": lambda sgd: lr_scheduler.LambdaLR(sgd, lambda epoch: 0.5**epoch),
    "multiplicative": lambda sgd: lr_scheduler.MultiplicativeLR(sgd, lambda epoch: 0.5),
    "cyclic": lambda sgd: lr_scheduler.CyclicLR(sgd, 0.1, 1.0, step_size_up=3, cycle_momentum=False),
    "one cycle": lambda sgd: lr_scheduler.OneCycleLR(sgd, max_lr=2.0, total_steps=8),
    "warm-up": lambda sgd: lr_scheduler.SequentialLR(
        sgd, [lr_scheduler.LinearLR(sgd, 0.1, total_iters=3), lr_scheduler.ExponentialLR(sgd, 0.9)], [3]
    ),
    "chained": lambda sgd: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(sgd, 0.1, total_iters=3), lr_scheduler.ExponentialLR(sgd, 0.9)]
    ),
    "swa": lambda sgd: torch.optim.swa_utils.SWALR(sgd, 0.05),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
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
        (lambda sgd: (lr_scheduler.ReduceLROnPlateau(sgd), "loss", sgd), TypeError, "must be the Engine whose metric"),
        (lambda sgd: (sgd,), TypeError, "takes a scheduler of torch.optim.lr_scheduler"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LRScheduler(*arguments(optimizer()))


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_goes_on_from_a_file_without_a_pickle(make: Any, tmp_path: Path) -> None:
    whole, sgd, resumed_sgd = optimizer(), optimizer(), optimizer()
    expected = rates(LRScheduler(make(whole)), whole, 6)
    first = LRScheduler(make(sgd))
    rates(first, sgd, 3)
    torch.save({"schedule": first.state_dict(), "optimizer": sgd.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = copy.deepcopy(state["schedule"])
    resumed = LRScheduler(make(resumed_sgd))
    resumed_sgd.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["schedule"])
    assert state["schedule"] == kept  # some of torch's schedules empty what they are given
    assert rates(resumed, resumed_sgd, 3) == pytest.approx(expected[3:])


def test_warm_up_by_iterations_then_a_cosine_as_the_docstring_shows_it() -> None:
    sgd = optimizer()
    warm_up = lr_scheduler.LinearLR(sgd, start_factor=0.01, total_iters=100)
    cosine = lr_scheduler.CosineAnnealingLR(sgd, T_max=900)
    both = lr_scheduler.SequentialLR(sgd, [warm_up, cosine], milestones=[100])
    trainer = Engine(lambda engine, batch: sgd.step())
    found = [sgd.param_groups[0]["lr"]]
    trainer.on(Events.ITERATION_COMPLETED, LRScheduler(both))
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: found.append(sgd.param_groups[0]["lr"]))
    trainer.run(range(100), max_epochs=10)
    assert found[0] == pytest.approx(0.01)
    assert found[50] == pytest.approx(0.01 + 0.99 * 0.5)
    assert found[100] == pytest.approx(1.0)
    assert found[550] == pytest.approx(0.5)
    assert found[1000] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "state", "message"),
    [
        ("step", {}, "not one of StepLR: it lacks"),
        ("step", {"x": 1}, "not one of StepLR: it"),
        ("warm-up", {"last_epoch": 3}, "not one of SequentialLR: "),
        ("step", [1], "is a dict, but got a list"),
    ],
)
def test_the_state_of_another_schedule_is_refused_and_nothing_changes(make: str, state: Any, message: str) -> None:
    schedule = LRScheduler(SCHEDULES[make](optimizer()))
    before = copy.deepcopy(schedule.state_dict())
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before


def test_a_plateau_on_a_matrix_names_the_metric() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LRScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), metric_name="confusion")
    trainer = Engine(lambda engine, batch: None)
    trainer.state.metrics["confusion"] = torch.zeros(2, 2)
    with pytest.raises(TypeError, match="the metric 'confusion' is tensor"):
        schedule(trainer)
