"""The average of a model in 16 bits that is cut up over ranks, kept in 32, through a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from dengine import Engine, Events, distributed
from dengine.handlers import EMA, Checkpoint


def trained(rank: int, size: int, strategy: str, folder: str, until: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)).bfloat16()
    options: dict[str, Any] = {"blocks": [nn.Linear]} if strategy == "fsdp" else {}
    model = distributed.prepare_model(bare, strategy, **options)  # type: ignore[arg-type]
    ema = EMA(model, decay=0.99)

    def step(engine: Engine, batch: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + batch % 3 / 64)

    trainer = Engine(step)
    trainer.on(Events.ITERATION_COMPLETED, ema)
    objects = {"trainer": trainer, "model": model, "ema": ema}
    trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint(objects, folder))
    Checkpoint.resume(folder, objects)
    trainer.run(list(range(20)), max_iterations=until)
    state = ema.state_dict()["model"]
    assert {value.dtype for value in ema.model.parameters()} == {torch.bfloat16}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resumed_average_is_that_of_one_uninterrupted_process(strategy: str, tmp_path: Path) -> None:
    (expected,) = run_ranks(trained, 1, "none", str(tmp_path / "alone"), 20, deadline_s=60)
    run_ranks(trained, 2, strategy, str(tmp_path / "parts"), 7, deadline_s=60)
    for state in run_ranks(trained, 2, strategy, str(tmp_path / "parts"), 20, deadline_s=60):
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name]), name
