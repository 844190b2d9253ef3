"""Check the arguments of handlers."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch

from dengine.checks import takes
from dengine.distributed import world
from dengine.dtensor import describe_mesh
from dengine.engine import Engine
from dengine.naming import describe

__all__ = [
    "MetricNames",
    "as_number",
    "check_engine",
    "check_function",
    "checked_names",
    "has_output",
    "warn_of_no_output",
]

MetricNames = Sequence[str] | Literal["all"] | None


def check_engine(handler: object, engine: object) -> None:
    """Check the argument of `attach`. Raises: TypeError: `engine` is not an Engine."""
    if not isinstance(engine, Engine):
        raise TypeError(f"{type(handler).__qualname__}.attach() takes an Engine, but got {engine!r}.")


def check_function(name: str, function: object, *arguments: str) -> None:
    """Check an optional function. Raises: TypeError: `function` is not None and cannot be called with `arguments`."""
    if function is None:
        return
    called = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise TypeError(f"{name}={function!r} must be callable, as {called}.")
    if not takes(function, len(arguments)):
        raise TypeError(f"{name}={describe(function)} cannot be called as {called}.")


def has_output(engine: Engine) -> bool:
    """Whether the step gave an output here.

    None is none if the batch was None, or on a mesh with `pp` or `cp`, as other ranks have it.
    """
    state = engine.state
    return state.output is not None or not (state._left_out == state.iteration or world().may_lack_output)


def warn_of_no_output(handler: str) -> None:
    """Say, once, that what rank 0 is to show is not there, if it never will be."""
    if not world().may_lack_output:  # only this batch was left out
        return
    warnings.warn(
        f"{handler} shows nothing of this step's output, which other ranks have, but rank 0 has not "
        f"({describe_mesh(world().mesh)}): show a metric, whose value every rank gets.",  # type: ignore[arg-type]
        RuntimeWarning,
        stacklevel=2,
    )


def checked_names(names: object) -> tuple[str, ...] | Literal["all"] | None:
    """`metric_names` as a tuple, or "all", or None.

    Raises: TypeError: it is another string, or no list of strings.
    """
    if names is None or (isinstance(names, str) and names == "all"):
        return names  # type: ignore[return-value]
    if isinstance(names, str):
        raise TypeError(f'metric_names={names!r} must be a list of names, [{names!r}], or "all".')
    found = tuple(names) if isinstance(names, Iterable) else (names,)
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in found):
        raise TypeError(f'metric_names={names!r} must be a list of names, or "all".')
    return found


def as_number(value: object) -> float | None:
    """`value` as a number (this waits for a value on a device); None if it is text, or several numbers."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, torch.Tensor) else value.size
        value = value.item() if size == 1 else None
    return float(value) if isinstance(value, (int, float, np.integer, np.floating, np.bool_)) else None
