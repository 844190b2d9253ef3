"""What handlers have counted so far goes on from a checkpoint in whose `to_save` they are listed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import EMA, Checkpoint, EarlyStopping, LRScheduler

rates = torch.optim.lr_scheduler
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda optimizer: rates.StepLR(optimizer, 3, 0.5),
    "one cycle": lambda optimizer: rates.OneCycleLR(optimizer, 0.1, total_steps=100),
    "warm-up, then a cosine": lambda optimizer: rates.SequentialLR(
        optimizer, [rates.LinearLR(optimizer, 0.1, 1.0, 4), rates.CosineAnnealingLR(optimizer, 30)], [4]
    ),
    "plateau": lambda optimizer: rates.ReduceLROnPlateau(optimizer, "max", 0.5, patience=1),
}
SCORES = [
    0.1,
    0.5,
    0.4,
    0.6,
    0.6,
    0.3,
    0.5,
    0.2,
    0.1,
    0.0,
]  # the best is the fourth: with patience 4 the eighth ends it


class Training:
    """A model that learns a little from each of three batches an epoch, and all handlers that count something."""

    def __init__(self, schedule: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.trainer = Engine(self.step)
        self.ema = EMA(self.model, decay=0.8)
        self.stop = EarlyStopping(4, lambda engine: SCORES[engine.state.epoch], self.trainer)
        is_plateau = schedule == "plateau"
        self.schedule = LRScheduler(SCHEDULES[schedule](self.optimizer), "score" if is_plateau else None)
        self.trainer.on(Events.EPOCH_COMPLETED, self.score, priority=1)
        self.trainer.on(Events.EPOCH_COMPLETED if is_plateau else Events.ITERATION_COMPLETED, self.schedule)
        self.trainer.on(Events.ITERATION_COMPLETED, self.ema)
        self.trainer.on(Events.EPOCH_COMPLETED, self.stop)
        names = ("model", "optimizer", "ema", "stop", "schedule", "trainer")
        self.objects = {name: getattr(self, name) for name in names}
        self.folder = folder

    def step(self, engine: Engine, batch: float) -> None:
        self.optimizer.zero_grad()
        (self.model(torch.tensor([batch, 1.0])) - batch).square().sum().backward()
        self.optimizer.step()

    def score(self, engine: Engine) -> None:
        engine.state.metrics = {"score": SCORES[engine.state.epoch]}

    def run(self, save_at: int = 0) -> dict[str, Any]:
        if save_at:
            self.trainer.on(
                Events.ITERATION_COMPLETED(once=save_at), Checkpoint(self.objects, self.folder), priority=-1
            )
        self.trainer.run([0.5, -1.0, 2.0], max_epochs=len(SCORES), max_iterations=save_at or None)
        return {
            "epoch": self.trainer.state.epoch,
            "rate": self.optimizer.param_groups[0]["lr"],
            "weights": self.model.weight.tolist(),
            "averaged": self.ema.model.weight.tolist(),
            "num_updates": self.ema.num_updates,
        }


@pytest.mark.parametrize("save_at", [1, 5, 9, 20])  # in the warm-up; within an epoch; at the end of one; near the stop
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_ends_as_one_never_interrupted(schedule: str, save_at: int, tmp_path: Path) -> None:
    expected = Training(schedule, tmp_path).run()
    assert expected["epoch"] == 7
    Training(schedule, tmp_path).run(save_at)
    resumed = Training(schedule, tmp_path)
    assert Checkpoint.resume(tmp_path, resumed.objects) is not None
    assert resumed.run() == expected
