"""Sequences of tokens, some of whose labels are ignored, and their trainer: the same in a rank and in the parent."""

from collections.abc import Callable
from typing import Any

import torch
from masked import IGNORED, num_tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, create_supervised_trainer, distributed

__all__ = ["IGNORED", "LENGTH", "data", "loss_of", "samples", "trainer_of"]

LENGTH = 4  # tokens of a sample


def samples(width: int = 6) -> TensorDataset:
    """22 of them, with `width` numbers for each token."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(22, LENGTH, width, generator=generator)
    labels = torch.randint(5, (22, LENGTH), generator=generator)
    labels[::3, 0] = IGNORED
    labels[1::4, 2:3] = IGNORED
    return TensorDataset(inputs, labels)


def data(batch_size: int, width: int = 6) -> Any:
    loader = DataLoader(samples(width), batch_size=batch_size, shuffle=True)
    return distributed.prepare_data_loader(loader, exact=True, seed=3)


def loss_of(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(pred.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def trainer_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int, part: int = 0, num_parts: int = 1
) -> Engine:
    """With weights of tokens and clipping; of each sample it takes the `part` of `num_parts` of its tokens."""
    return create_supervised_trainer(
        model,
        optimizer,
        loss_of,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.2,
        weight=num_tokens,
        prepare_batch=_own_tokens(part, LENGTH // num_parts),
    )


def _own_tokens(part: int, length: int) -> Callable[[Any, torch.device], Any]:
    mine = slice(part * length, (part + 1) * length)

    def prepare(batch: Any, device: torch.device) -> Any:
        inputs, labels = batch
        return inputs[:, mine].to(device), labels[:, mine].to(device)

    return prepare
