"""Experts that are dealt out over the ranks of a mesh: the weights of one process, which runs all of them."""

from math import prod
from typing import Any
from zlib import crc32

import pytest
import torch
from experts import MoE, Net
from ranks import run_ranks
from tensors import whole_parameters
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from dengine import create_supervised_trainer, distributed

IGNORED = -100
LENGTH = 4  # tokens of a sample


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(22, LENGTH, 6, generator=generator)
    labels = torch.randint(5, (22, LENGTH), generator=generator)
    labels[::3, 0] = IGNORED
    labels[1::4, 2:3] = IGNORED
    return TensorDataset(inputs, labels)


def loss_of(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(pred.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def with_weights(net: Net) -> Net:
    """`net` with weights that depend on names alone, and routers that like some experts more than others."""
    for name, value in net.named_parameters():
        with torch.no_grad():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(crc32(name.encode()))) / 3)
            if name.endswith("router.bias"):
                value.copy_(torch.tensor([0.2, 0.0, 0.2, 0.6]))
    return net


def plan() -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "last": RowwiseParallel(input_layouts=Replicate()),
    }


def moes(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def prepared(net: Net, **options: Any) -> nn.Module:
    for layer in moes(net):
        assert distributed.prepare_model(layer.experts, parts="ep") is layer.experts
    return distributed.prepare_model(net, **options)


def train(model: nn.Module, batch_size: int, accumulation: int) -> nn.Module:
    torch.manual_seed(7)
    loader = distributed.prepare_data_loader(
        DataLoader(samples(), batch_size=batch_size, shuffle=True), exact=True, seed=3
    )
    trainer = create_supervised_trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        loss_of,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.2,
        weight=lambda inputs, labels: (labels != IGNORED).sum(),
    )
    trainer.run(loader, max_epochs=2)
    return model


def trained(rank: int, size: int, mesh: dict[str, int]) -> list[Any]:
    with distributed.process_group(mesh=mesh) as here:
        found = []
        for accumulation in (1, 2):
            net = with_weights(Net())
            model = prepared(net, **({"tensor_parallel": plan()} if "tp" in mesh else {}))
            weights = whole_parameters(train(model, 8 // here.data_size, accumulation))
            found.append((weights, min(each for layer in moes(net) for each in layer.least)))
        return found


@pytest.mark.parametrize(
    "mesh",
    [
        {"dp": 2, "ep": 2},
        {"dp_shard": 2, "ep": 2},
        {"dp_replicate": 2, "ep": 2},
        {"ep": 4},
        {"ep": 2, "tp": 2},
        {"ep": 2, "dp_shard": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_mean_over_the_global_batch(mesh: dict[str, int]) -> None:
    expected = [whole_parameters(train(with_weights(Net()), 8, accumulation)) for accumulation in (1, 2)]
    begun = whole_parameters(with_weights(Net()))
    assert not any(value.equal(begun[name]) for each in expected for name, value in each.items())
    seen: set[str] = set()
    least = []
    for of_rank in run_ranks(trained, prod(mesh.values()), mesh, deadline_s=240):
        for (weights, fewest), whole in zip(of_rank, expected, strict=True):
            least.append(fewest)
            seen |= weights.keys()
            for name, value in weights.items():
                assert_close(value, whole[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert min(least) == 0  # an expert had no token of some rank
    assert seen == begun.keys()
