"""Batches of any sizes, the same in a rank and in the parent, some of whose targets may be ignored."""

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["IGNORED", "Batch", "batches_of", "num_tokens"]

Batch: TypeAlias = tuple[Tensor, Tensor]
IGNORED = -100


def batches_of(rank: int, sizes: list[int], *, is_masked: bool, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Where masked, some targets are ignored: the first of each batch never, so that its mean is a number."""
    generator = torch.Generator().manual_seed(100 + rank)
    batches = []
    for size in sizes:
        targets = torch.randint(0, 3, (size,), generator=generator)
        if is_masked:
            is_left_out = torch.rand(size, generator=generator) < 0.6
            is_left_out[0] = False
            targets[is_left_out] = IGNORED
        batches.append((torch.randn(size, 4, generator=generator, dtype=dtype), targets))
    return batches


def num_tokens(inputs: Tensor, targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum()
