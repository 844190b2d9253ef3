"""Whole tensors of models that are spread over ranks, for comparison with one process's."""

from typing import Any

import torch
from torch import nn

from dengine import distributed

__all__ = ["whole_parameters", "whole_tensor"]


def whole_tensor(value: Any) -> Any:
    """All of a DTensor, which is a collective of its ranks; anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """A whole copy of each parameter of the bare model, by its name."""
    return {
        name: whole_tensor(value).detach().clone() for name, value in distributed.unwrap_model(model).named_parameters()
    }
