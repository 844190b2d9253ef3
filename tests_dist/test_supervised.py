"""Supervised training over real ranks, against the gradient of the mean over the global batch, computed here."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, SupervisedEvents, create_supervised_trainer, distributed

Batch = tuple[Tensor, Tensor]
Shards = list[list[int]]  # for each rank the sizes of its batches
IGNORED = -100
LR = 0.1


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches_of(rank: int, sizes: list[int], *, is_masked: bool) -> list[Batch]:
    """Where masked, some targets are ignored: the first of each batch never, so that its mean is a number."""
    generator = torch.Generator().manual_seed(100 + rank)
    batches = []
    for size in sizes:
        targets = torch.randint(0, 3, (size,), generator=generator)
        if is_masked:
            is_left_out = torch.rand(size, generator=generator) < 0.6
            is_left_out[0] = False
            targets[is_left_out] = IGNORED
        batches.append((torch.randn(size, 4, generator=generator, dtype=torch.float64), targets))
    return batches


def weights_by_hand(shards: Shards, accumulation: int, epochs: int, *, is_masked: bool, clip: float | None = None) -> Any:
    """One process that sees the global batch of each step, and sums its loss over it."""
    model = net()
    of_ranks = [batches_of(rank, sizes, is_masked=is_masked) for rank, sizes in enumerate(shards)]
    length = max(map(len, of_ranks))
    for _ in range(epochs):
        for first in range(0, length, accumulation):
            batches = [batch for batches in of_ranks for batch in batches[first : first + accumulation]]
            loss = sum(cross_entropy(model(x), y, reduction="sum") for x, y in batches)
            count = sum(int((y != IGNORED).sum()) for _, y in batches)
            model.zero_grad()
            (loss / count).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= LR * parameter.grad
    return {name: value.detach() for name, value in model.named_parameters()}


def num_tokens(inputs: Tensor, targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum()


def trained(
    rank: int, size: int, shards: Shards, is_masked: bool, epochs: int, strategy: str, options: dict[str, Any]
) -> tuple[dict[str, Tensor], int, int]:
    """The weights, the iterations, and the steps of the optimizer."""
    model = net(rank)  # rank 0's must win
    if rank == 0:
        model = net()
    if strategy != "bare":
        model = distributed.prepare_model(model, strategy)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    trainer = create_supervised_trainer(
        model, optimizer, cross_entropy, weight=num_tokens if is_masked else None, **options
    )
    steps = []
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: steps.append(engine.state.iteration))
    trainer.run(batches_of(rank, shards[rank], is_masked=is_masked), max_epochs=epochs)
    found: Any = {name: value.detach() for name, value in distributed.unwrap_model(model).named_parameters()}
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}
    return whole, trainer.state.iteration, len(steps)


UNEVEN: Shards = [[5, 3, 4, 2, 6], [1, 7, 2, 2, 1], [4, 4, 1, 3, 2]]
SHORTER: Shards = [[5, 3, 4, 2, 6], [1, 7, 2, 2], [4, 4, 1]]
EMPTY: Shards = [[5, 3, 1], [], [2, 2]]


CASES = list(product(["bare", "ddp", "fsdp"], [False, True], [1, 2, 3]))


def trained_in_each_case(rank: int, size: int, shards: Shards) -> list[tuple[dict[str, Tensor], int, int]]:
    return [
        trained(rank, size, shards, is_masked, 2, strategy, {"gradient_accumulation_steps": accumulation})
        for strategy, is_masked, accumulation in CASES
    ]


@pytest.mark.parametrize("shards", [UNEVEN[:1], SHORTER[:2], UNEVEN, SHORTER, EMPTY], ids=str)
def test_a_step_is_that_of_the_mean_over_the_global_batch(shards: Shards) -> None:
    length = max(map(len, shards))
    for found in run_ranks(trained_in_each_case, len(shards), shards, deadline_s=120.0):
        for (strategy, is_masked, accumulation), (weights, iterations, steps) in zip(CASES, found, strict=True):
            case = f"{strategy}, {is_masked=}, {accumulation=}"
            assert (iterations, steps) == (2 * length, 2 * -(-length // accumulation)), case
            expected = weights_by_hand(shards, accumulation, 2, is_masked=is_masked)
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_norm_that_is_clipped_is_that_of_the_whole_gradient(strategy: str) -> None:
    expected = weights_by_hand(SHORTER, 2, 2, is_masked=True, clip=0.05)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    for weights, _, _ in run_ranks(trained, 3, SHORTER, True, 2, strategy, options):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
