"""Ranks on GPUs: exact evaluation, checkpoints of what lies there, and a rank that fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpus import over_gpus, spread
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint
from dengine.metrics import Accuracy, Average, F1Score

pytestmark = pytest.mark.gpu
LENGTH = 11


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(LENGTH, 3, generator=generator), torch.randint(0, 3, (LENGTH,), generator=generator)


def evaluated(rank: int, size: int, backend: str) -> dict[str, Any]:
    with distributed.process_group(backend) as here:
        loader = distributed.prepare_data_loader(DataLoader(TensorDataset(*samples()), 2, pin_memory=True), exact=True)
        engine = Engine(lambda engine, batch: tuple(part.to(here.device, non_blocking=True) for part in batch))
        engine.add_metrics({"acc": Accuracy(), "f1": F1Score(), "mean": Average(lambda output: output[0])})
        return dict(engine.run(loader).metrics)


@over_gpus
def test_an_evaluation_counts_every_sample_once(backend: str, size: int) -> None:
    scores, labels = samples()
    found = run_ranks(evaluated, size, backend, init=False, deadline_s=120.0)
    for metrics in found:
        assert metrics["acc"] == (scores.argmax(1) == labels).double().mean().item()
        assert metrics["mean"] == pytest.approx(scores.double().mean().item(), abs=1e-12)
        assert metrics == found[0]


def parts_of(strategy: str) -> tuple[Engine, dict[str, Any]]:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    model = spread(bare, strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: Tensor) -> None:
        optimizer.zero_grad()
        model(batch.cuda()).square().mean().backward()
        optimizer.step()

    trainer = Engine(step)
    return trainer, {"model": model, "optimizer": optimizer, "trainer": trainer}


def numbers(parts: dict[str, Any]) -> list[Tensor]:
    """The weights and moments of this rank, with the next random numbers of its device."""
    moments = [value for state in parts["optimizer"].state.values() for value in state.values()]
    held = [*parts["model"].parameters(), *moments]
    return [
        *((value.to_local() if hasattr(value, "to_local") else value).detach().cpu() for value in held),
        torch.rand(3, device="cuda").cpu(),
    ]


def resumed(rank: int, size: int, backend: str, strategy: str, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """This rank after a run as it is and after one that was resumed from the fifth of its nine iterations."""
    with distributed.process_group(backend):
        batches = [torch.full((4, 3), float(number + rank)) for number in range(9)]
        trainer, parts = parts_of(strategy)
        trainer.on(Events.ITERATION_COMPLETED(once=5), Checkpoint(parts, folder, asynchronous=True))
        torch.cuda.manual_seed(rank)
        trainer.run(batches)
        whole = numbers(parts)
        trainer, parts = parts_of(strategy)
        assert Checkpoint.resume(folder, parts), "nothing to resume"
        torch.cuda.manual_seed(77)  # the state in the checkpoint must win
        trainer.run(batches)
        return whole, numbers(parts)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@over_gpus
def test_a_resumed_run_has_the_bits_of_one_that_was_not_cut(
    backend: str, size: int, strategy: str, tmp_path: Path
) -> None:
    found = run_ranks(resumed, size, backend, strategy, str(tmp_path), init=False, deadline_s=120.0)
    for whole, again in found:
        assert len(whole) == len(again)
        assert all(map(torch.equal, whole, again))
    if size > 1:  # ranks draw numbers of their own
        assert not torch.equal(found[0][0][-1], found[1][0][-1])


def fails_on_one(rank: int, size: int, backend: str) -> None:
    with distributed.process_group(backend):
        trainer, _ = parts_of("ddp")

        def fail(engine: Engine) -> None:
            if rank == size - 1:
                raise ValueError("the culprit")

        trainer.on(Events.ITERATION_STARTED(once=3), fail)
        trainer.run([torch.ones(4, 3)] * 9)


@over_gpus
def test_a_failing_rank_ends_all_and_is_named(backend: str, size: int) -> None:
    outcomes = run_ranks(fails_on_one, size, backend, init=False, deadline_s=60.0, expect_failures=True)
    assert outcomes[-1].error_type == "ValueError"
    for outcome in outcomes[:-1]:
        assert outcome.error_type == "RemoteRankError", outcome
        assert f"rank {size - 1}" in outcome.error_message.lower()
        assert "the culprit" in outcome.error_message


def joined(rank: int, size: int) -> None:
    with distributed.process_group():
        pass


def test_two_ranks_on_one_gpu_are_told_what_nccl_needs() -> None:
    outcomes = run_ranks(
        joined, 2, init=False, env={"CUDA_VISIBLE_DEVICES": "0"}, deadline_s=60.0, expect_failures=True
    )
    for outcome in outcomes:
        assert outcome.error_type == "LaunchError", outcome
        assert f"Rank {outcome.rank} and another rank of its host have one GPU" in outcome.error_message
        assert "--nproc-per-node=gpu" in outcome.error_message
