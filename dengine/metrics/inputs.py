"""Predictions and targets as metrics take them: numbers or tensors, checked by shape, never by value."""

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["as_pair", "as_tensor", "is_number", "shape_error", "what_it_got"]


def as_pair(output: Any, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`(prediction, target)` as tensors of at least one dimension, detached, on one device. No wait for the device.

    Raises:
        TypeError: not a pair of numbers or tensors; it says how to make one.
    """
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        raise TypeError(
            f"{metric} takes a (prediction, target) pair, but got {what_it_got(output)}: pass output_transform=, a "
            "function of the step's output that gives the pair."
        )
    prediction, target = _row(as_tensor(output[0], metric)), _row(as_tensor(output[1], metric))
    if prediction.device != target.device:
        # Towards the accelerator: the other way would wait for it.
        if prediction.device.type == "cpu":
            prediction = prediction.to(target.device, non_blocking=True)
        else:
            target = target.to(prediction.device, non_blocking=True)
    return prediction, target


def as_tensor(part: Any, metric: str) -> torch.Tensor:
    """A detached tensor of any dimension. Python's floats keep their 64 bits.

    Raises:
        TypeError: neither number, array nor tensor; or a list of tensors, which could be read on the host only.
    """
    if isinstance(part, torch.Tensor):
        return part.detach() if part.requires_grad else part
    if isinstance(part, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in part):
        raise TypeError(f"{metric} takes numbers or tensors, but got a list of tensors: torch.stack() or cat() them.")
    try:
        tensor = torch.as_tensor(part)
        is_rounded = tensor.dtype == torch.float32 and not hasattr(part, "dtype")
        return torch.as_tensor(part, dtype=torch.float64) if is_rounded else tensor
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{metric} takes numbers or tensors, but got {part!r}.") from None


def is_number(value: object) -> bool:
    """Whether `value` is one of Python's own numbers, so that no tensor is needed."""
    return isinstance(value, (int, float))


def what_it_got(output: Any) -> str:
    """For an error: the type of a step's output and, of a mapping, the keys that there are."""
    keys = f" with the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"a {type(output).__qualname__}{keys}"


def shape_error(metric: str, prediction: torch.Tensor, target: torch.Tensor, takes: str) -> ValueError:
    return ValueError(
        f"{metric} got predictions of shape {tuple(prediction.shape)} and targets of shape {tuple(target.shape)}; it "
        f"takes {takes}."
    )


def _row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.ndim else tensor.reshape(1)
