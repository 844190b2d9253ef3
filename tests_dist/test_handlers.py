"""Handlers on real ranks: the same average as one process, the same stop after a resume, and no rank left waiting."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_tensor
from torch import nn

from dengine import Engine, Events, distributed
from dengine.handlers import EMA, EarlyStopping, MemoryMonitor, Timer


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))


def averaged(model: nn.Module, batches: list[torch.Tensor]) -> tuple[EMA, torch.Tensor]:
    """The average after some steps, and what its model gives; it is used and saved between the steps too."""
    ema = EMA(model, decay=0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    inputs = torch.ones(2, 3)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(inputs)  # FSDP2 leaves whole weights in the place of the shards behind a forward

    trainer = Engine(step)
    trainer.on(Events.ITERATION_COMPLETED, ema)
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: ema.model(inputs) is None)
    trainer.run(batches)
    return ema, ema.model(inputs)


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: whole_tensor(value) for name, value in state.items()}


def averaged_over_ranks(rank: int, size: int, strategy: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool]:
    options: dict[str, Any] = {"blocks": [nn.Linear]} if strategy == "fsdp" else {}
    model = distributed.prepare_model(model_of(rank), strategy, **options)  # type: ignore[arg-type]
    batches = [batch[rank::size] for batch in samples()]
    ema, output = averaged(model, batches)
    state = whole(ema.state_dict()["model"])
    other = EMA(model, decay=0.9)
    other.load_state_dict({"num_updates": 4, "model": state})
    is_same = torch.equal(other.model(torch.ones(2, 3)), output)
    return state, output, is_same


def samples() -> list[torch.Tensor]:
    return list(torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_average_over_two_ranks_is_that_of_one_process(strategy: str) -> None:
    ema, output = averaged(model_of(0), samples())
    for state, found, is_same_after_loading in run_ranks(averaged_over_ranks, 2, strategy, deadline_s=60):
        assert state.keys() == ema.model.state_dict().keys()
        for name, value in ema.model.state_dict().items():
            torch.testing.assert_close(state[name], value)
        torch.testing.assert_close(found, output)
        assert is_same_after_loading


SCORES = [1.0, 2.0, 1.5, 1.6, 3.0, 2.0, 2.9, 1.0, 9.0, 9.0]  # 3.0 is the best; three calls later it ends


def stopping(rank: int, scores: list[float]) -> tuple[Engine, EarlyStopping]:
    trainer = Engine(lambda engine, batch: distributed.all_reduce(float(batch)))
    # Only rank 0's score is asked for.
    stop = EarlyStopping(3, lambda engine: scores[engine.state.epoch] if rank == 0 else float("nan"), trainer)
    trainer.on(Events.EPOCH_COMPLETED, stop)
    return trainer, stop


def stopped_after_resume(rank: int, size: int, first_epochs: int) -> tuple[int, int]:
    trainer, _ = stopping(rank, SCORES)
    uninterrupted = trainer.run([1, 2], max_epochs=10).epoch
    trainer, stop = stopping(rank, SCORES)
    trainer.run([1, 2], max_epochs=first_epochs)
    resumed, resumed_stop = stopping(rank, SCORES)
    resumed.load_state_dict(trainer.state_dict())
    resumed_stop.load_state_dict(stop.state_dict())
    return uninterrupted, resumed.run([1, 2], max_epochs=10).epoch


@pytest.mark.parametrize("first_epochs", [1, 3, 6, 7])
def test_a_resumed_run_stops_where_one_never_interrupted_does(first_epochs: int) -> None:
    assert run_ranks(stopped_after_resume, 2, first_epochs, deadline_s=60) == [(7, 7)] * 2


def measured(rank: int, size: int) -> tuple[dict[str, float], list[bool], float]:
    """Rank 2 has no batch at all, and rank 1 more memory than the others."""
    ballast = torch.ones(2**26 if rank == 1 else 1)
    trainer, timer, seen = Engine(lambda engine, batch: None), Timer(), list[bool]()
    timer.attach(trainer, start=Events.EPOCH_STARTED)
    MemoryMonitor().attach(trainer)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: seen.append(timer.step_time() == timer.step_time()))
    trainer.run(range([3, 1, 0][rank]), max_epochs=2)
    assert ballast.numel()
    return dict(trainer.state.metrics), seen, timer.value()  # type: ignore[arg-type]


def test_uneven_ranks_all_get_the_peak_of_the_one_that_needs_most() -> None:
    results = run_ranks(measured, 3, deadline_s=60)
    peaks = [metrics["peak_host_mib"] for metrics, _, _ in results]
    assert peaks[0] == peaks[1] == peaks[2] > 256
    assert [has_steps for _, has_steps, _ in results] == [[True] * 2, [True] * 2, [False] * 2]
    assert all(0 < value < 60 for _, _, value in results)
