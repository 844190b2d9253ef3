"""Check the value that a metric computes (a number, a tensor, or a mapping of them), and pack it for the reduction."""

from collections.abc import Mapping
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch

from dengine.errors import NotComputableError
from dengine.types import MetricValue

__all__ = ["Computed", "Form", "checked", "flat", "from_flat", "laid_out"]

# For each value in a mapping: name ("" without a mapping), shape, whether it is complex. () for a number.
Form: TypeAlias = tuple[tuple[str, tuple[int, ...], bool], ...]


class Computed:
    """Stands for a metric whose value is known already."""

    def __init__(self, value: object, reason: str = "it was not updated on any rank") -> None:
        self._value = value
        self._reason = reason

    def compute(self) -> Any:
        if self._value is None:
            raise NotComputableError(self._reason)
        return self._value


def checked(value: object, label: str) -> Any:
    """`value`, with arrays and lists of numbers as tensors.

    Raises:
        TypeError: it is not a number, a tensor, or a mapping of them.
    """
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (bool, int, float, complex, np.number, np.bool_)):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, Mapping):
        return {key: checked(part, f"{label}, at {key!r},") for key, part in value.items()}
    if isinstance(value, (list, np.ndarray)):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    kind = "None" if value is None else f"a {type(value).__qualname__}"
    raise TypeError(f"Metric {label} computed {kind}, but compute() must give a number, a tensor or a mapping of them.")


def flat(name: str, value: Any) -> dict[str, MetricValue]:
    """The entries of `state.metrics`: numbers as floats, tensors on the CPU, a mapping's values as `name/key`."""
    if isinstance(value, Mapping):
        return {key: one for part, inner in value.items() for key, one in flat(f"{name}/{part}", inner).items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return {name: value.item() if value.ndim == 0 else value}
    if value is None or isinstance(value, str):
        raise TypeError(
            f"Metric {name!r} computed {value!r}: compute() must give a number, a tensor or a mapping of them."
        )
    return {name: float(value) if isinstance(value, (int, float)) else value}


def laid_out(value: object) -> tuple[torch.Tensor, Form]:
    """All numbers of a checked value in float64, and their form."""
    parts = _parts("", value)
    form = tuple((name, tuple(part.shape), part.is_complex()) for name, part in parts)
    if form == (("", (), False),):
        return parts[0][1].double(), ()
    rows = [(torch.view_as_real(part) if part.is_complex() else part).double().reshape(-1) for _, part in parts]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.float64), form


def from_flat(numbers: torch.Tensor, form: Form) -> Any:
    """The value of which `laid_out` gave the numbers; a mapping's inner values as `outer/inner`."""
    if not form:
        return numbers
    lengths = [prod(shape) * (2 if is_complex else 1) for _, shape, is_complex in form]
    values = {}
    for (name, shape, is_complex), part in zip(form, numbers.split(lengths), strict=True):  # type: ignore[no-untyped-call]
        values[name] = torch.view_as_complex(part.reshape(*shape, 2).clone()) if is_complex else part.reshape(shape)
    return values[""] if list(values) == [""] else values


def _parts(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, Mapping):
        inner = [(f"{name}/{key}" if name else str(key), part) for key, part in value.items()]
        return [one for key, part in inner for one in _parts(key, part)]
    return [(name, value.cpu() if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=_wide(value)))]


def _wide(value: object) -> torch.dtype:
    return torch.complex128 if isinstance(value, complex) else torch.float64
