"""Flatten nested containers of numbers and tensors for a collective, and rebuild them. Pure."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch

from dengine import trees

__all__ = ["ReduceOp", "flatten", "grouped", "signature", "split"]

ReduceOp: TypeAlias = Literal["sum", "mean", "min", "max"]


def signature(value: object) -> str:
    """The signature of `value`, which must be the same on all ranks: names, types and shapes, not values."""
    if (parts := _parts_in_order(value)) is not None:
        if not trees.has_names(value):
            return "[" + ", ".join(signature(part) for _, _, part in parts) + "]"
        return "{" + ", ".join(f"{key!r}: {signature(part)}" for _, key, part in parts) + "}"
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def flatten(value: Any, leaves: list[torch.Tensor], op: ReduceOp) -> Callable[[list[torch.Tensor]], Any]:
    """Append the tensors in `value` to `leaves`; gives a function that rebuilds `value` from the reduced tensors.

    Raises:
        TypeError, ValueError: a leaf that is neither a number nor a tensor, or that `op` cannot reduce.
    """
    if (parts := _parts_in_order(value)) is not None:
        rebuilds = {index: flatten(part, leaves, op) for index, _, part in parts}
        in_own_order = [rebuilds[index] for index in range(len(rebuilds))]
        return lambda reduced: trees.with_parts(value, [rebuild(reduced) for rebuild in in_own_order])
    if not isinstance(value, torch.Tensor | int | float):
        raise TypeError(f"all_reduce() takes numbers and tensors, nested or not, but got {value!r}.")
    tensor = value.detach() if isinstance(value, torch.Tensor) else _number_tensor(value)
    if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(
            f"The mean of whole numbers ({value!r}) may not be whole, but the result has the dtype of the input: pass "
            "floats, or op='sum'."
        )
    if tensor.dtype == torch.bool and op == "sum":
        raise ValueError("The sum of booleans is not one: convert them to int first, or use op='max' for 'any'.")
    place = len(leaves)
    leaves.append(tensor)
    if isinstance(value, torch.Tensor):
        return lambda reduced: reduced[place]
    return lambda reduced: type(value)(reduced[place].item())


def grouped(tensors: list[torch.Tensor]) -> dict[tuple[torch.dtype, torch.device], list[int]]:
    """The indices of the tensors that can be sent as one: those of one dtype, on one device."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(index)
    return groups


def split(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """`flat` cut into pieces of the shapes of `like`, each with memory of its own."""
    pieces = torch.split(flat, [tensor.numel() for tensor in like])
    return [piece.reshape(tensor.shape).clone() for piece, tensor in zip(pieces, like, strict=True)]


def _parts_in_order(value: Any) -> list[tuple[int, Any, Any]] | None:
    """The parts of a container as (index, key, part); None for a leaf.

    The parts of a mapping are ordered by key, so that two ranks may have filled theirs in a different order.
    """
    parts = trees.parts(value)
    if parts is None:
        return None
    indexed = [(index, key, part) for index, (key, part) in enumerate(parts)]
    return sorted(indexed, key=lambda each: repr(each[1])) if isinstance(value, Mapping) else indexed


def _number_tensor(value: int | float) -> torch.Tensor:
    dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64
    return torch.tensor(value, dtype=dtype)
