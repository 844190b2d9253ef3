"""Predictions and targets as metrics take them: numbers or tensors, checked by shape, never by value."""

from typing import Any

import torch

__all__ = ["as_pair", "label_shape_error"]


def as_pair(output: Any, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`(prediction, target)` as tensors of at least one dimension, detached, on one device. No wait for the device.

    Raises:
        TypeError: not a pair of numbers or tensors; it says how to make one.
    """
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        keys = f" with the keys {sorted(map(str, output))}" if isinstance(output, dict) else ""
        raise TypeError(
            f"{metric} takes a (prediction, target) pair, but got a {type(output).__qualname__}{keys}: pass "
            "output_transform=, a function of the step's output that gives the pair."
        )
    prediction, target = (_as_tensor(part, metric) for part in output)
    if prediction.device != target.device:
        target = target.to(prediction.device, non_blocking=True)
    return prediction, target


def label_shape_error(metric: str, prediction: torch.Tensor, target: torch.Tensor) -> ValueError:
    return ValueError(
        f"{metric} got predictions of shape {tuple(prediction.shape)} and targets of shape {tuple(target.shape)}; it "
        "takes (N, ...) labels with (N, ...) predicted labels or (N, C, ...) scores."
    )


def _as_tensor(part: Any, metric: str) -> torch.Tensor:
    try:
        tensor = part.detach() if isinstance(part, torch.Tensor) else torch.as_tensor(part)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{metric} takes numbers or tensors, but got {part!r}.") from None
    return tensor if tensor.ndim else tensor.reshape(1)
