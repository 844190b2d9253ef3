"""The step under which a handler saves or logs."""

from collections.abc import Callable
from typing import Any, TypeAlias

from dengine.checks import whole_number
from dengine.engine import Engine

__all__ = ["StepTransform", "check_step_transform", "step_of"]

StepTransform: TypeAlias = Callable[[Engine, Any], int]


def check_step_transform(name: str, value: object) -> None:
    """
    Raises:
        TypeError: it is neither None nor can be called.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}={value!r} must be callable, as {name}(engine, event) -> int.")


def step_of(engine: Engine, transform: StepTransform | None) -> int:
    """The engine's iteration, or what `transform(engine, event)` gives.

    Raises:
        TypeError, ValueError: that is no whole number of at least 0.
    """
    if transform is None:
        return engine.state.iteration
    return whole_number("The step", transform(engine, engine.firing), least=0)
