"""Find the number by which a loss function over classes divides its mean."""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy, nll_loss

from dengine import torch_internals
from dengine.metrics.core.inputs import is_kept
from dengine.types import accumulator_dtype

__all__ = ["class_loss", "count_of", "num_probabilities", "option", "source_of", "weight_of"]

_CLASS_LOSSES = (cross_entropy, nll_loss)
_CLASS_MODULES = (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)


def class_loss(loss_fn: object) -> object:
    """The function, module or partial inside `loss_fn` if that is `cross_entropy` or `nll_loss`, else None."""
    source = source_of(loss_fn)
    function = source.func if isinstance(source, partial) else source
    is_one = isinstance(function, _CLASS_MODULES) or any(function is each for each in _CLASS_LOSSES)
    return source if is_one else None


def source_of(loss_fn: object) -> object:
    """The function, module or partial inside a bound method or a compiled module."""
    owner = getattr(loss_fn, "__self__", None)
    source = owner if isinstance(owner, torch.nn.Module) else loss_fn
    return torch_internals.inside_compile(source)


def option(source: object, name: str) -> Any:
    """The present value of an option of a loss function: the weights of a module may move to another device."""
    default = {"weight": None, "ignore_index": -100, "reduction": "mean"}[name]
    if isinstance(source, partial):
        if name in source.keywords:
            return source.keywords[name]
        source = source.func
    return getattr(source, name, default) if isinstance(source, torch.nn.Module) else default


def count_of(source: object, labels: torch.Tensor) -> torch.Tensor:
    """The divisor of a class loss over `labels`: the number of those that count, or the sum of their weights."""
    kept = is_kept(labels, option(source, "ignore_index"))
    weight = option(source, "weight")
    return kept.sum() if weight is None else weight_of(labels, kept, weight)


def num_probabilities(target: torch.Tensor) -> int:
    """The divisor of a class loss whose targets are class probabilities."""
    return target.numel() // target.shape[1] if target.ndim > 1 and target.shape[1] else 1


def weight_of(labels: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of the class weights of the labels that are kept."""
    # The loss function refuses a label outside the classes.
    index = torch.where(kept, labels, 0).long().clamp(0, weight.numel() - 1)
    weights = weight.detach().to(labels.device, accumulator_dtype(labels.device), non_blocking=True)[index]
    return torch.where(kept, weights, 0.0).sum()
