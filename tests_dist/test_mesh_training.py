"""The supervised trainer on a mesh: the weights of one process, with uneven shards, token weights and clipping."""

from math import prod
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_parameters
from tokens import data, trainer_of
from torch import nn
from torch.testing import assert_close

from dengine import distributed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.second(self.first(inputs).tanh())


def plan() -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"first": ColwiseParallel(), "second": RowwiseParallel()}


def train(model: nn.Module, batch_size: int, part: int, num_parts: int, accumulation: int) -> nn.Module:
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    trainer_of(model, optimizer, accumulation, part, num_parts).run(data(batch_size), max_epochs=2)
    return model


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def trained(rank: int, size: int, mesh: dict[str, int], accumulation: int) -> dict[str, torch.Tensor]:
    with distributed.process_group(mesh=mesh) as here:
        model = distributed.prepare_model(net(), **({"tensor_parallel": plan()} if "tp" in mesh else {}))
        part, num_parts = here.coordinates.get("cp", 0), mesh.get("cp", 1)
        return whole_parameters(train(model, 8 // here.data_size, part, num_parts, accumulation))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "mesh",
    [
        {"dp": 2, "tp": 2},
        {"dp_shard": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp": 2, "cp": 2},
        {"dp_shard": 2, "cp": 2},
        {"tp": 4},
        {"cp": 2, "tp": 2},
        {"dp_replicate": 4},
        {"dp_shard": 4},
        {"cp": 4},
        {"dp_replicate": 2, "cp": 2},
        {"dp_replicate": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2, "tp": 2},
        {"dp_shard": 2, "cp": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2, "cp": 2},
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_mean_over_the_global_batch(mesh: dict[str, int], accumulation: int) -> None:
    expected = whole_parameters(train(net(), 8, 0, 1, accumulation))
    assert all(not value.equal(begun) for value, begun in zip(expected.values(), net().parameters(), strict=True))
    for found in run_ranks(trained, prod(mesh.values()), mesh, accumulation, deadline_s=180):
        for name, value in expected.items():
            assert_close(found[name], value, rtol=1e-6, atol=1e-6)
