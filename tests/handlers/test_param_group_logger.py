"""Which numbers of an optimizer are logged, and under which names."""

from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import LRScheduler, ParamGroupLogger


class Log:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values))


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def logged(optimizer: Any) -> dict[str, Any]:
    log, trainer = Log(), Engine(lambda engine, batch: batch)
    trainer.on(Events.ITERATION_COMPLETED, ParamGroupLogger(optimizer, log))
    trainer.run([0])
    return log.rows[0][1]


def test_groups_are_told_apart_by_number_or_by_name() -> None:
    groups = [{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": 0.2}]
    assert logged(torch.optim.SGD(groups, momentum=0.9)) == {
        "lr/0": 0.1,
        "lr/1": 0.2,
        "momentum/0": 0.9,
        "momentum/1": 0.9,
    }
    named = [{"params": [parameter()], "lr": 0.1, "name": name} for name in ("body", "head")]
    assert logged(torch.optim.SGD(named)).keys() == {"lr/body", "lr/head", "momentum/body", "momentum/head"}


def test_betas_and_a_rate_that_is_a_tensor() -> None:
    optimizer = torch.optim.Adam([parameter()], lr=torch.tensor(0.5), betas=(0.8, 0.99))
    assert logged(optimizer) == {"lr": 0.5, "beta1": 0.8, "beta2": 0.99}


def test_a_schedule_is_seen_at_the_step_that_is_asked_for() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    log, trainer = Log(), Engine(lambda engine, batch: optimizer.step())
    trainer.on(Events.EPOCH_COMPLETED, ParamGroupLogger(optimizer, log, lambda engine, event: engine.state.epoch))
    trainer.on(Events.EPOCH_COMPLETED, LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)))
    trainer.run([0], max_epochs=3)
    assert [(step, row["lr"]) for step, row in log.rows] == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_what_is_no_optimizer_and_no_run_is_refused() -> None:
    with pytest.raises(TypeError, match="takes an optimizer with param_groups, but got 3"):
        ParamGroupLogger(3, Log())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot be logged to"):
        ParamGroupLogger(torch.optim.SGD([parameter()]), None)
