"""Trackers that take numbers one by one, and schedules that are told how far they are, are taken as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.checkpoint import load, save
from dengine.handlers import LRScheduler, ParamGroupLogger, TrackingHandler


class AimRun:
    """As `aim.Run`: `track(value, name, step, ...)`, and no `log`."""

    def __init__(self) -> None:
        self.tracked: list[tuple[str, float, int]] = []

    def track(
        self, value: Any, name: str | None = None, step: int | None = None, *, context: dict[str, Any] | None = None
    ) -> None:
        assert name is not None
        assert step is not None
        self.tracked.append((name, value, step))


class ClearmlLogger:
    """As `clearml.Logger`."""

    def __init__(self) -> None:
        self.reported: list[tuple[str, str, float, int]] = []

    def report_scalar(self, title: str, series: str, value: float, iteration: int) -> None:
        self.reported.append((title, series, value, iteration))


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def logged(run: Any) -> None:
    trainer = Engine(lambda engine, batch: {"val/loss": torch.tensor(batch / 2), "word": "text"})
    trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(run, output_transform=lambda output: output))
    trainer.on(Events.EPOCH_COMPLETED, ParamGroupLogger(optimizer(), run))
    trainer.run([1, 2])


def test_a_run_of_aim_and_a_logger_of_clearml_are_logged_to() -> None:
    aim, clearml = AimRun(), ClearmlLogger()
    logged(aim)
    logged(clearml)
    assert aim.tracked == [("val/loss", 0.5, 1), ("val/loss", 1.0, 2), ("lr", 1.0, 2), ("momentum", 0.0, 2)]
    assert clearml.reported == [
        ("val", "loss", 0.5, 1),
        ("val", "loss", 1.0, 2),
        ("lr", "lr", 1.0, 2),
        ("momentum", "momentum", 0.0, 2),
    ]


class TimmScheduler:
    """As timm's `Scheduler`: its value is a function of the epoch or the update that it is told."""

    def __init__(self, optimizer: torch.optim.Optimizer, t_in_epochs: bool = True) -> None:
        self.optimizer = optimizer
        self.t_in_epochs = t_in_epochs
        self.seen = 0

    def step(self, epoch: int, metric: float | None = None) -> None:
        if self.t_in_epochs:
            self._set(epoch)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        if not self.t_in_epochs:
            self._set(num_updates)

    def _set(self, at: int) -> None:
        self.seen = at
        for group in self.optimizer.param_groups:
            group["lr"] = 1 / (1 + at)

    def state_dict(self) -> dict[str, Any]:
        return {"t_in_epochs": self.t_in_epochs, "seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)


class PlateauLRScheduler(TimmScheduler):
    def step(self, epoch: int, metric: float | None = None) -> None:
        assert metric == 0.25
        super().step(epoch)


@pytest.mark.parametrize("in_epochs", [True, False])
def test_a_schedule_of_timm_is_told_the_epoch_or_the_update_also_after_a_resume(
    in_epochs: bool, tmp_path: Path
) -> None:
    def run(until: int, from_file: bool) -> float:
        own = optimizer()
        schedule = LRScheduler(TimmScheduler(own, in_epochs))
        trainer = Engine(lambda engine, batch: None)
        trainer.on(Events.EPOCH_COMPLETED if in_epochs else Events.ITERATION_COMPLETED, schedule)
        objects = {"schedule": schedule, "trainer": trainer, "optimizer": own}
        if from_file:
            load(tmp_path / "a.pt", objects)
        trainer.run([0, 0, 0], max_epochs=until)
        save(tmp_path / "a.pt", objects)
        return float(own.param_groups[0]["lr"])

    assert run(1, False) == (1 / 2 if in_epochs else 1 / 4)
    assert run(3, True) == (1 / 4 if in_epochs else 1 / 10)


def test_a_plateau_of_timm_gets_its_metric_and_is_refused_without() -> None:
    own = optimizer()
    with pytest.raises(ValueError, match="PlateauLRScheduler waits for a metric"):
        LRScheduler(PlateauLRScheduler(own))
    trainer = Engine(lambda engine, batch: engine.state.metrics.update(loss=0.25))
    trainer.on(Events.EPOCH_COMPLETED, LRScheduler(PlateauLRScheduler(own), "loss"))
    trainer.run([0])
    assert own.param_groups[0]["lr"] == 1 / 2


def test_a_state_of_another_schedule_changes_nothing() -> None:
    schedule = LRScheduler(TimmScheduler(optimizer()))
    with pytest.raises(ValueError, match="TimmScheduler"):
        schedule.load_state_dict({"seen": 3})
    assert schedule.state_dict()["seen"] == 0


@pytest.mark.parametrize("wrong", [optimizer(), "cosine", TimmScheduler, object(), None])
def test_what_is_no_schedule_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="LRScheduler"):
        LRScheduler(wrong)


def test_a_schedule_of_timm_itself() -> None:
    timm = pytest.importorskip("timm.scheduler")
    own = optimizer()
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.EPOCH_COMPLETED, LRScheduler(timm.CosineLRScheduler(own, t_initial=10)))
    trainer.run([0], max_epochs=5)
    assert own.param_groups[0]["lr"] == pytest.approx(0.5)
