"""Wrap the `update`, `reset` and `compute` of every metric class, whoever wrote it.

So the number of updates is right, and an error names the metric, without any code in the class.
"""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, isfunction, signature
from typing import Any, Protocol

from dengine.errors import NotComputableError
from dengine.types import MetricValue

__all__ = ["counting", "counts_updates", "wrap_methods"]

_IS_WRAPPED = "_dengine_is_wrapped"


class _Counted(Protocol):
    num_updates: int

    def update(self, output: object) -> None: ...


def wrap_methods(cls: type, base: type) -> set[str]:
    """Wrap the methods that `cls` does not inherit from `base` and that are not wrapped yet, and give their names."""
    names = {name for name in _WRAPPERS if _is_to_be_wrapped(getattr(cls, name), getattr(base, name))}
    for name in names:
        wrapped = _WRAPPERS[name](getattr(cls, name))
        setattr(wrapped, _IS_WRAPPED, True)
        setattr(cls, name, wrapped)
    return names


def _is_to_be_wrapped(found: object, of_base: object) -> bool:
    return isfunction(found) and found is not of_base and not hasattr(found, _IS_WRAPPED)


def counts_updates(metric: _Counted) -> bool:
    """Whether `metric.num_updates` counts the calls of `metric.update`. Not if `update` was set on the object."""
    return getattr(metric.update, _IS_WRAPPED, False)


def counting(update: Callable[..., None]) -> Callable[..., None]:
    """`update` with a count: one for each call, however many base classes count it; from 0 again if it resets."""

    @wraps(update)
    def counted_one(self: _Counted, output: object) -> None:
        before = self.num_updates
        update(self, output)
        after = self.num_updates
        self.num_updates = (before if before < after else after) + 1

    @wraps(update)
    def counted(self: _Counted, *args: Any, **kwargs: Any) -> None:
        before = self.num_updates
        update(self, *args, **kwargs)
        after = self.num_updates
        self.num_updates = (before if before < after else after) + 1

    # An update of a small batch is so quick that packing its argument would cost noticeable time.
    return counted_one if _takes_one_output(update) else counted


def _takes_one_output(update: Callable[..., None]) -> bool:
    parameters = list(signature(update).parameters.values())
    if [each.name for each in parameters] != ["self", "output"]:
        return False
    return parameters[1].kind is Parameter.POSITIONAL_OR_KEYWORD and parameters[1].default is Parameter.empty


def _uncounting(reset: Callable[..., None]) -> Callable[..., None]:
    @wraps(reset)
    def uncounted(self: _Counted, *args: Any, **kwargs: Any) -> None:
        reset(self, *args, **kwargs)
        self.num_updates = 0

    return uncounted


def _named(compute: Callable[..., MetricValue]) -> Callable[..., MetricValue]:
    @wraps(compute)
    def named(self: _Counted) -> MetricValue:
        try:
            return compute(self)
        except NotComputableError as error:
            name = type(self).__name__
            raise NotComputableError(f"{name} cannot be computed: {error.reason}.", reason=error.reason) from None

    return named


_WRAPPERS: dict[str, Callable[..., Any]] = {"update": counting, "reset": _uncounting, "compute": _named}
