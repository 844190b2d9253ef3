"""A job is preempted by a signal to one of its ranks, and goes on: bit for bit what it would have been."""

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint, Preemption
from dengine.metrics import Average

LENGTH, EPOCHS = 22, 3  # 2 ranks with batches of 2: 6 iterations an epoch, the last one padded


class Augmented(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index)) + torch.randn(4)


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def trained(rank: int, size: int, folder: str, signal_at: int, who: int, workers: int, number: int) -> dict[str, Any]:
    """One job: resumes where there is something, and is preempted in iteration `signal_at` of the whole training."""
    with distributed.process_group(timeout=60):
        torch.manual_seed(7)
        model = distributed.prepare_model(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
        torch.manual_seed(rank)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        data: Any = Augmented()
        loader = distributed.prepare_data_loader(
            DataLoader(data, batch_size=2, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        )

        def step(engine: Engine, batch: torch.Tensor) -> float:
            if engine.state.iteration == signal_at and rank == who:
                os.kill(os.getpid(), number)
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()  # type: ignore[no-any-return]

        trainer = Engine(step)
        trainer.add_metric(Average(), "loss")
        losses: list[Any] = []
        trainer.on(Events.EPOCH_COMPLETED, lambda engine: losses.append(engine.state.metrics["loss"]))
        objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
        checkpoint = Checkpoint(objects, folder, "preempted")
        Preemption(checkpoint).attach(trainer)
        Checkpoint.resume(folder, objects, "preempted")
        begun = trainer.state.iteration
        state = trainer.run(loader, max_epochs=EPOCHS)
        return {
            "begun": begun,
            "iteration": state.iteration,
            "preempted": state.preempted,
            "digest": digest(distributed.unwrap_model(model)),
            "losses": losses,
        }


def run(folder: Path, signal_at: int = 0, who: int = 0, workers: int = 0, number: int = signal.SIGTERM) -> list[Any]:
    return run_ranks(trained, 2, str(folder), signal_at, who, workers, number, init=False, deadline_s=90)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("signal_at", "who", "workers", "number"),
    [
        (1, 1, 0, signal.SIGTERM),
        (5, 0, 0, signal.SIGUSR2),  # the stop is agreed upon in the last iteration of the epoch, or after it
        (6, 1, 0, signal.SIGUSR1),
        (8, 0, 2, signal.SIGUSR1),
    ],
)
def test_a_preempted_job_ends_with_the_bits_of_one_that_never_was(
    tmp_path: Path, uninterrupted: list[Any], signal_at: int, who: int, workers: int, number: int
) -> None:
    first = run(tmp_path, signal_at, who, workers, number)
    assert [told["preempted"] for told in first] == [True, True]
    assert first[0]["iteration"] == first[1]["iteration"]
    assert signal_at <= first[0]["iteration"] <= signal_at + 3
    second = run(tmp_path, workers=workers)
    for rank, told in enumerate(second):
        assert told["begun"] == first[rank]["iteration"]
        assert told["preempted"] is False
        assert told["digest"] == uninterrupted[rank]["digest"]
        assert first[rank]["losses"] + told["losses"] == uninterrupted[rank]["losses"]
