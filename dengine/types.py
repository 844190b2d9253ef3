"""Protocols and types that more than one room uses."""

from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = ["MetricValue", "Stateful", "accumulator_dtype", "is_short_float", "summable"]

MetricValue: TypeAlias = float | torch.Tensor


@runtime_checkable
class Stateful(Protocol):
    """What can be put into a checkpoint and taken out again."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """What floats are summed in: float64, except on Apple's GPU, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def summable(count: Any) -> Any:
    """`count`, a number or a tensor, in a type whose sums neither overflow nor are rounded: int64 or `float64`.

    A numpy scalar becomes a Python number. No wait for the device.
    """
    if isinstance(count, torch.Tensor):
        dtype = accumulator_dtype(count.device) if count.is_floating_point() else torch.int64
        return count if count.dtype == dtype and not count.requires_grad else count.detach().to(dtype)
    return count.item() if getattr(count, "ndim", None) == 0 and hasattr(count, "item") else count


def is_short_float(value: Any) -> bool:
    """Whether it is a tensor of floats of 16 bits, in which a mean is too coarse."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize == 2
