"""Supervised training over several GPUs by NCCL, against the gradient of the mean over the global batch."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import create_supervised_trainer, distributed

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two CUDA devices, and there are {NUM_GPUS}"),
]
SHARDS = [[5, 3, 4, 2, 6], [1, 7, 2, 2]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches_of(rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator))
        for n in SHARDS[rank]
    ]


def trained(rank: int, size: int, strategy: str, options: dict[str, Any]) -> dict[str, Tensor]:
    with distributed.process_group():
        model = distributed.prepare_model(net(), strategy)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=2, **options)
        trainer.run(batches_of(rank), max_epochs=2)
        found: Any = dict(distributed.unwrap_model(model).named_parameters())
        whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}
        return {name: value.detach().cpu() for name, value in whole.items()}


@pytest.mark.parametrize(
    ("strategy", "options", "atol"),
    [("ddp", {}, 1e-6), ("fsdp", {}, 1e-6), ("ddp", {"mixed_precision": "bf16"}, 1e-2)],
)
def test_a_step_is_that_of_the_mean_over_the_global_batch(strategy: str, options: dict[str, Any], atol: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for first in range(0, 5, 2):
            batches = [batch for rank in range(2) for batch in batches_of(rank)[first : first + 2]]
            inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    for found in run_ranks(trained, 2, strategy, options, init=False, deadline_s=180.0):
        for name, value in model.named_parameters():
            torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=atol)
