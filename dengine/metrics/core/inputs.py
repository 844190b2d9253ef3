"""Convert predictions and targets to tensors, and check their shapes. Values are never checked here."""

from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch.nn.parameter import is_lazy

from dengine.checks import whole_number
from dengine.comm.collectives import whole_tensor
from dengine.metrics.core.transform import prediction_and_target
from dengine.naming import a_type

__all__ = [
    "as_pair",
    "as_real",
    "as_tensor",
    "checked_ignore_index",
    "is_kept",
    "is_python_number",
    "shape_error",
    "what_it_got",
]


def as_pair(output: object, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`(prediction, target)` as tensors of at least one dimension, detached, on one device. No wait for the device.

    A mapping is read by its keys, as a step's output is.

    Raises:
        TypeError: it is not a pair of real numbers or tensors; the message says how to make one.
    """
    if isinstance(output, Mapping):
        output = prediction_and_target(output)
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        raise TypeError(
            f"{metric} takes a (prediction, target) pair, but got {what_it_got(output)}: pass output_transform=, a "
            "function of the step's output that gives the pair."
        )
    prediction, target = _row(as_real(output[0], metric)), _row(as_real(output[1], metric))
    if prediction.device != target.device:
        # To the accelerator: a copy from it would wait for it.
        if prediction.device.type == "cpu":
            prediction = prediction.to(target.device, non_blocking=True)
        else:
            target = target.to(prediction.device, non_blocking=True)
    return prediction, target


def as_real(part: object, metric: str) -> torch.Tensor:
    """`part` as `as_tensor` gives it, checked to be real.

    Raises:
        TypeError: as `as_tensor`, or the numbers are complex.
    """
    tensor = as_tensor(part, metric)
    if tensor.is_complex():
        raise TypeError(
            f"{metric} takes real numbers, but got {tensor.dtype}, which is complex: pass output_transform=, a "
            "function of the step's output that gives real ones (abs(), real, or view_as_real)."
        )
    return tensor


def as_tensor(part: object, metric: str) -> torch.Tensor:
    """`part` as a detached tensor. Python's floats keep their 64 bits. A DTensor becomes a whole tensor: a collective.

    Raises:
        TypeError: it is not a number, an array or a tensor; or it is a tensor of a lazy module without a shape yet, or
            a list of tensors, which could only be read on the host.
    """
    if isinstance(part, torch.Tensor):
        if is_lazy(part):
            raise TypeError(
                f"{metric} got a {type(part).__name__}: its lazy module has not seen a batch yet. Call the module once "
                "before."
            )
        return whole_tensor(part.detach() if part.requires_grad else part, metric)
    if isinstance(part, Mapping):
        raise TypeError(
            f"{metric} takes numbers or tensors, but got {what_it_got(part)}: pass output_transform=, a function of "
            "the step's output that takes one of its entries, as in lambda output: (output['pred']['logits'], "
            "output['label'])."
        )
    if isinstance(part, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in part):
        raise TypeError(f"{metric} takes numbers or tensors, but got a list of tensors: torch.stack() or cat() them.")
    try:
        tensor = torch.as_tensor(part)
        is_rounded = tensor.dtype == torch.float32 and not hasattr(part, "dtype")
        return torch.as_tensor(part, dtype=torch.float64) if is_rounded else tensor
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{metric} takes numbers or tensors, but got {part!r}.") from None


def is_python_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a Python number, so that no tensor is needed."""
    return isinstance(value, (int, float))


def checked_ignore_index(ignore_index: object) -> int | None:
    """Check `ignore_index`. Raises: TypeError: it is neither a whole number nor None."""
    return None if ignore_index is None else whole_number("ignore_index", ignore_index, least=-(2**63))


def is_kept(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """A mask of the labels that are not `ignore_index`. No wait for the device."""
    is_counted = not (labels.is_floating_point() or labels.dtype == torch.bool)
    if is_counted and not torch.iinfo(labels.dtype).min <= ignore_index <= torch.iinfo(labels.dtype).max:
        return torch.ones_like(labels, dtype=torch.bool)  # a byte is never -100, but torch would compare with 156
    return labels != ignore_index


def what_it_got(output: object) -> str:
    """The type of a step's output, with the keys of a mapping, for an error message."""
    keys = f" with the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"{a_type(output)}{keys}"


def shape_error(metric: str, prediction: torch.Tensor, target: torch.Tensor, takes: str) -> ValueError:
    return ValueError(
        f"{metric} got predictions of shape {tuple(prediction.shape)} and targets of shape {tuple(target.shape)}; it "
        f"takes {takes}."
    )


def _row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.ndim else tensor.reshape(1)
