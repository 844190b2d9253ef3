"""Protocols and types that more than one room uses."""

from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = ["MetricValue", "Stateful", "accumulator_dtype", "is_short_float"]

MetricValue: TypeAlias = float | torch.Tensor


@runtime_checkable
class Stateful(Protocol):
    """What can be put into a checkpoint and taken out again."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """What floats are summed in: float64, except on Apple's GPU, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_short_float(value: Any) -> bool:
    """Whether it is a tensor of floats of 16 bits, in which a mean is too coarse."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize == 2
