"""The gradient of a loss that divides by something else than samples is that of one process over the global batch."""

from functools import partial
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dengine import create_supervised_trainer, distributed

WEIGHT = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)


class Tokens(nn.Module):
    """(N, T) -> (N, C, T), or (N, C) of the first."""

    def __init__(self, has_tokens: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.has_tokens = has_tokens

    def forward(self, inputs: Tensor) -> Any:
        logits = self.net(inputs.unsqueeze(-1)).movedim(-1, 1)
        return logits if self.has_tokens else logits[:, :, 0]


def loss_of(kind: str) -> Any:
    return {
        "weighted": nn.CrossEntropyLoss(weight=WEIGHT),
        "weighted tokens": partial(cross_entropy, weight=WEIGHT),
        "ignoring a class": nn.CrossEntropyLoss(ignore_index=1),
        "masked tokens": cross_entropy,
        "plain": nn.CrossEntropyLoss(),
        "compiled": torch.compile(nn.CrossEntropyLoss(weight=WEIGHT), backend="eager"),
        "soft": nn.CrossEntropyLoss(weight=WEIGHT),
    }[kind]


def data(kind: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (12, 5), generator=generator)
    labels[0::2] = torch.where(torch.rand(6, 5, generator=generator) < 0.7, -100, labels[0::2])
    labels[0] = labels[2] = -100  # the whole first batch of the first of two ranks
    if kind == "soft":
        return TensorDataset(inputs, torch.rand(12, 3, dtype=torch.float64, generator=generator).softmax(1))
    return TensorDataset(inputs, labels if "tokens" in kind else labels[:, 0].clamp(min=0))


KINDS = ("weighted", "weighted tokens", "ignoring a class", "masked tokens", "plain", "compiled", "soft")


def trained(rank: int, size: int, batch_size: int, num_batches: int) -> dict[str, Tensor]:
    weights = {}
    for kind in KINDS:
        model = Tokens("tokens" in kind)
        loader = DataLoader(data(kind), batch_size=batch_size)
        if size > 1:
            loader = distributed.prepare_data_loader(loader)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        trainer = create_supervised_trainer(model, optimizer, loss_of(kind), gradient_accumulation_steps=num_batches)
        trainer.run(loader, max_epochs=2)
        weights.update({f"{kind}: {name}": value.detach() for name, value in model.named_parameters()})
    return weights


@pytest.mark.parametrize("num_batches", [1, 2])
def test_any_number_of_ranks_trains_the_same(num_batches: int) -> None:
    (expected,) = run_ranks(trained, 1, 4 * num_batches, 1)
    for found in (*run_ranks(trained, 2, 2, num_batches), *run_ranks(trained, 1, 4, num_batches)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)
