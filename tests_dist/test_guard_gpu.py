"""A guard on GPUs: no good step waits, and a bad one leaves no trace."""

import math
import warnings
from typing import Any

import pytest
import torch
from gpus import over_gpus, spread
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Events, create_supervised_trainer, distributed
from dengine.handlers import EMA, LRScheduler
from dengine.metrics import Average
from dengine.supervised import SupervisedEvents

pytestmark = pytest.mark.gpu
Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def batches_of(rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (
            torch.randn(6, 4, generator=generator).pin_memory(),
            torch.randint(0, 3, (6,), generator=generator).pin_memory(),
        )
        for _ in range(30)
    ]


def trainer_of(guard: Any) -> Any:
    model = spread(net())
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, max_grad_norm=1.0, guard=guard)
    ema = EMA(model, 0.9)
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, ema)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, LRScheduler(schedule))
    trainer.add_metric(Average(output_transform=lambda output: output["loss"]), "loss")
    return trainer, model, ema


def waits(rank: int, size: int, guard: dict[str, Any]) -> tuple[int, list[int]]:
    """The iterations that ran while any wait of the host for the GPU was an error, and those left out."""
    with distributed.process_group():
        trainer, _, _ = trainer_of(guard)
        trainer.run(batches_of(rank))  # what is made once
        done: list[int] = []
        trainer.on(Events.GET_BATCH_COMPLETED(once=4), lambda engine: torch.cuda.set_sync_debug_mode("error"))
        trainer.on(Events.ITERATION_COMPLETED(after=3), lambda engine: done.append(engine.state.iteration), priority=-1)
        trainer.on(
            Events.ITERATION_COMPLETED(once=28), lambda engine: torch.cuda.set_sync_debug_mode("default"), priority=-2
        )
        state = trainer.run(batches_of(rank))
        return len(done), state.skipped


@pytest.mark.parametrize(
    "guard", [{}, {"spike": 8.0, "on_bad": "roll_back", "snapshot_every": 10}], ids=["plain", "all"]
)
@over_gpus
def test_no_good_step_waits_for_the_device(backend: str, size: int, guard: dict[str, Any]) -> None:
    if backend == "gloo":
        pytest.skip("Gloo itself waits for the device")
    assert run_ranks(waits, size, guard, init=False, deadline_s=120.0) == [(27, [])] * size


def trained(rank: int, size: int, backend: str, is_clean: bool) -> Any:
    with distributed.process_group(backend):
        trainer, model, ema = trainer_of(False if is_clean else {"snapshot_every": 7})
        data = batches_of(rank)
        if is_clean:
            del data[11]
        elif rank == size - 1:
            data[11] = (data[11][0] * math.nan, data[11][1])
        torch.manual_seed(5 + rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = trainer.run(data)
        tensors = [*model.state_dict().values(), *ema.model.state_dict().values()]
        return [each.cpu() for each in tensors], float(state.metrics["loss"]), getattr(state, "skipped", [])


@over_gpus
def test_a_bad_step_leaves_no_trace(backend: str, size: int) -> None:
    found = run_ranks(trained, size, backend, False, init=False, deadline_s=120.0)
    wanted = run_ranks(trained, size, backend, True, init=False, deadline_s=120.0)
    for (tensors, loss, skipped), (others, other_loss, _) in zip(found, wanted, strict=True):
        assert skipped == [12]
        assert all(torch.equal(*pair) for pair in zip(tensors, others, strict=True))
        assert loss == other_loss
