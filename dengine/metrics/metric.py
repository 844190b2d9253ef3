"""What a metric is: a few states with declared reductions, and a value computed from them. It knows no rank."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeAlias

import torch

from dengine.metrics.transform import prediction_and_target
from dengine.types import MetricValue

__all__ = ["Metric", "OutputTransform", "StateOp", "StateSpec"]

OutputTransform: TypeAlias = Callable[[Any], Any]
StateOp: TypeAlias = Literal["sum", "mean", "min", "max", "cat", "gather"]
_STATE_OPS = ("sum", "mean", "min", "max", "cat", "gather")


@dataclass(frozen=True)
class StateSpec:
    """One declared state: its value after `reset()`, and how the ranks' values become one."""

    default: Any
    reduce: StateOp


class Metric(ABC):
    """Base class of metrics: `reset`, `update(output)` and `compute`.

    A metric declares its states, and is then exact over any number of ranks, in one all-reduce together with all other
    metrics of its engine. One that declares nothing works too: it is computed per rank, and averaged by the number of
    its updates.

    Args:
        output_transform: turns the step's output into what `update` takes. By default a `(prediction, target)` pair
            stays, a mapping is read by its keys (`pred | y_pred | preds | logits` and
            `label | labels | y | target | targets`), and anything else reaches `update` as it is. A subclass that
            never calls this constructor gets the step's whole output.

    Example:
        >>> class Positives(Metric):
        ...     def __init__(self):
        ...         super().__init__(output_transform=lambda output: output)
        ...         self.add_state("count", 0, reduce="sum")
        ...     def update(self, output):
        ...         self.count += sum(value > 0 for value in output)
        ...     def compute(self):
        ...         return float(self.count)
        >>> metric = Positives()
        >>> metric.update([1, -1, 2])
        >>> metric.compute()
        2.0
    """

    # Class attributes, so that a subclass that never calls __init__ has them.
    transform: OutputTransform | None = None
    num_updates: int = 0  # since the last reset
    num_sets: int = 0  # engines that update it
    adds_to_no_graph: bool = False  # whether `update` sees to that; elsewhere an engine calls it without gradients
    _states: Mapping[str, StateSpec] = {}

    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        if output_transform is not None and not callable(output_transform):
            raise TypeError(f"output_transform={output_transform!r} must be callable, as output_transform(output).")
        self.has_own_transform = output_transform is not None
        self.transform = self.default_transform if output_transform is None else output_transform

    has_own_transform: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Whether a rank saw anything decides how it counts in a reduction, and an `update` that a user wrote cannot
        # be asked to keep the number.
        if "update" in cls.__dict__:
            cls.update = _counting(cls.update)  # type: ignore[method-assign]
        if {"update", "default_transform"} & cls.__dict__.keys() and "adds_to_no_graph" not in cls.__dict__:
            cls.adds_to_no_graph = False  # what a base class says of its own
        if "reset" in cls.__dict__:
            cls.reset = _uncounting(cls.reset)  # type: ignore[method-assign]

    def default_transform(self, output: Any) -> Any:
        """What a step's output becomes where no `output_transform` is given."""
        return prediction_and_target(output)

    def add_state(self, name: str, default: Any, reduce: StateOp = "sum") -> None:
        """Declare the attribute `name`: `default` after `reset()`, and `reduce`d over the ranks.

        Args:
            default: a number or a tensor; `[]` for "cat". A tensor without elements is one whose shape the first
                update will tell.
            reduce: "sum", "min", "max"; "mean", plain over the ranks that saw anything; "cat", a list of tensors
                joined along their first dimension; "gather", the ranks' tensors stacked, (ranks, ...).

        Raises:
            ValueError: an unknown `reduce`, or a default that does not go with it. TypeError: no number nor tensor.
        """
        if reduce not in _STATE_OPS:
            raise ValueError(f"reduce={reduce!r} of state {name!r} must be one of {', '.join(_STATE_OPS)}.")
        if (reduce == "cat") != (isinstance(default, list) and not default):
            raise ValueError(f"State {name!r} has reduce={reduce!r} and default {default!r}: 'cat' goes with [].")
        if not isinstance(default, (int, float, torch.Tensor, list)):
            raise TypeError(f"The default of state {name!r} must be a number or a tensor, but is {default!r}.")
        self._states = {**self._states, name: StateSpec(default, reduce)}
        setattr(self, name, _fresh(default))

    @property
    def states(self) -> Mapping[str, StateSpec]:
        """The declared states by name; empty where the metric declares nothing."""
        return self._states

    def reset(self) -> None:
        """Back to the defaults."""
        for name, spec in self._states.items():
            setattr(self, name, _fresh(spec.default))
        self.num_updates = 0

    @abstractmethod
    def update(self, output: Any) -> None:
        """Take in one step's output, after `output_transform`. Must not wait for the device."""

    @abstractmethod
    def compute(self) -> MetricValue:
        """The value of what this rank has seen since the last `reset()`.

        Raises:
            NotComputableError: nothing was seen.
        """

    def with_states(self, values: Mapping[str, Any]) -> "Metric":
        """A copy that holds `values` as its states; this one goes on accumulating untouched."""
        reduced = copy(self)
        for name, value in values.items():
            setattr(reduced, name, value)
        return reduced

    def settle(self) -> None:  # noqa: B027 - most have nothing to do
        """Called before the states are read, for a reduction or a checkpoint: to put in what is known only now, as a
        clock's time."""

    # -- composition ---------------------------------------------------------------------------------------------

    def leaves(self) -> tuple["Metric", ...]:
        """The metrics that hold the states this one is computed from: itself, unless it is made of others."""
        return (self,)

    def evaluate(self, reduced: Mapping[int, Any]) -> MetricValue:
        """The value, given the reduced copies of the leaves by the leaves' `id`."""
        value: MetricValue = reduced[id(self)].compute()
        return value

    def covers(self, other: "Metric") -> bool:
        """Whether this leaf's states tell all that `other` would count of the same outputs, so that one is enough."""
        return False

    def replace_leaf(self, leaf: "Metric", stand_in: "Metric") -> None:  # noqa: B027 - most read no leaf but themselves
        """Compute from `stand_in`, which covers it, what was computed from `leaf`."""

    def __add__(self, other: Any) -> "Metric":
        return Expression(operator.add, self, other)

    def __radd__(self, other: Any) -> "Metric":
        return Expression(operator.add, other, self)

    def __sub__(self, other: Any) -> "Metric":
        return Expression(operator.sub, self, other)

    def __rsub__(self, other: Any) -> "Metric":
        return Expression(operator.sub, other, self)

    def __mul__(self, other: Any) -> "Metric":
        return Expression(operator.mul, self, other)

    def __rmul__(self, other: Any) -> "Metric":
        return Expression(operator.mul, other, self)

    def __truediv__(self, other: Any) -> "Metric":
        return Expression(_divided, self, other)

    def __rtruediv__(self, other: Any) -> "Metric":
        return Expression(_divided, other, self)

    def __pow__(self, other: Any) -> "Metric":
        return Expression(operator.pow, self, other)

    def __neg__(self) -> "Metric":
        return Expression(operator.neg, self)

    def __abs__(self) -> "Metric":
        return Expression(abs, self)

    def __getitem__(self, index: Any) -> "Metric":
        return Expression(operator.getitem, self, index)


def _fresh(default: Any) -> Any:
    if isinstance(default, torch.Tensor):
        return default.detach().clone()
    return list(default) if isinstance(default, list) else default


# Above the class that they are already applied to while this module is read.
def _counting(update: Callable[..., None]) -> Callable[..., None]:
    @wraps(update)
    def counted(self: Metric, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        self.num_updates += 1

    return counted


def _uncounting(reset: Callable[..., None]) -> Callable[..., None]:
    @wraps(reset)
    def uncounted(self: Metric, *args: Any, **kwargs: Any) -> None:
        reset(self, *args, **kwargs)
        self.num_updates = 0

    return uncounted


class Expression(Metric):
    """Arithmetic between metrics and numbers, e.g. `2 * p * r / (p + r)`. Its metrics are updated once each."""

    def __init__(self, function: Callable[..., Any], *operands: Any) -> None:
        self._function = function
        self._operands = operands

    def leaves(self) -> tuple[Metric, ...]:
        found = [leaf for operand in self._metrics() for leaf in operand.leaves()]
        return tuple({id(leaf): leaf for leaf in found}.values())

    def reset(self) -> None:
        for leaf in self.leaves():
            leaf.reset()

    def update(self, output: Any) -> None:
        for leaf in self.leaves():
            leaf.update(leaf.transform(output) if leaf.transform is not None else output)

    def replace_leaf(self, leaf: Metric, stand_in: Metric) -> None:
        for operand in self._metrics():
            operand.replace_leaf(leaf, stand_in)

    def compute(self) -> MetricValue:
        return self.evaluate({id(leaf): leaf for leaf in self.leaves()})

    def evaluate(self, reduced: Mapping[int, Any]) -> MetricValue:
        values = [part.evaluate(reduced) if isinstance(part, Metric) else part for part in self._operands]
        result: MetricValue = self._function(*values)
        return result

    def _metrics(self) -> list[Metric]:
        return [operand for operand in self._operands if isinstance(operand, Metric)]


def _divided(first: Any, second: Any) -> Any:
    """`first / second` as tensors divide: 0 / 0 is nan, and ends no run."""
    try:
        return first / second
    except ZeroDivisionError:
        return float(torch.tensor(first, dtype=torch.float64) / second)
