"""The `repr` of metrics: the arguments that differ from their defaults."""

from collections.abc import Iterator
from inspect import Parameter, signature
from typing import Any

import torch

__all__ = ["shown_settings"]

_NOT_THERE = object()
_SHORT = (bool, int, float, str, type, torch.device, torch.dtype)
_HOLDERS = ("_stateful", "settings", "_settings")


def shown_settings(metric: object) -> str:
    """The arguments of a metric as text, `average='macro', num_classes=10`, from attributes with the same names."""
    shown = []
    for parameter in signature(type(metric).__init__).parameters.values():
        value = _remembered(metric, parameter.name)
        if parameter.name != "output_transform" and value is not _NOT_THERE and not _is_default(value, parameter):
            shown.append(f"{parameter.name}={_shown(value)}")
    return ", ".join(shown)


def _remembered(metric: object, name: str) -> Any:
    for holder in _holders(metric):
        for attribute in (name, f"_{name}"):
            if attribute in getattr(holder, "__dict__", {}):
                return vars(holder)[attribute]
    return _NOT_THERE


def _holders(metric: object) -> Iterator[Any]:
    yield metric
    for name in _HOLDERS:
        if (holder := getattr(metric, "__dict__", {}).get(name)) is not None:
            yield from _holders(holder)


def _is_default(value: object, parameter: Parameter) -> bool:
    default = parameter.default
    return value is default or (type(value) in (bool, int, float, str) and value == default)


def _shown(value: object) -> str:
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__name__", f"{type(value).__name__}()")
    is_short = value is None or isinstance(value, _SHORT) or hasattr(type(value), "compute")
    return repr(value) if is_short else f"<{type(value).__name__}>"
