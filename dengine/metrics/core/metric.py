"""The base class of metrics: states with declared reductions, and a value computed from them. It knows no rank."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from dengine.metrics.core.shown import shown_settings
from dengine.metrics.core.transform import prediction_and_target
from dengine.metrics.core.wrapped_methods import wrap_methods
from dengine.naming import other_names
from dengine.types import MetricValue

if TYPE_CHECKING:
    from dengine.metrics.core.kinds import AnyMetric

__all__ = ["Metric", "OutputTransform", "StateOp", "StateSpec"]

OutputTransform: TypeAlias = Callable[[Any], Any]
StateOp: TypeAlias = Literal["sum", "mean", "min", "max", "cat", "gather", "samples"]
_STATE_OPS = get_args(StateOp)


@dataclass(frozen=True)
class StateSpec:
    """One declared state: its value after `reset()`, and the reduction over ranks."""

    default: Any
    reduce: StateOp


@other_names(
    attach="write engine.add_metric(metric, name)",
    detach="an engine keeps its metrics: make an engine without it",
    is_attached="engine.metric_names lists the metrics of an engine",
    iteration_completed="an engine calls update(output) with what the step returned",
)
class Metric(ABC):
    """Base class of metrics: `reset`, `update(output)` and `compute`.

    A metric declares its states, and is then exact over any number of ranks, in one all-reduce together with all other
    metrics of its engine. A metric without declared states works, too: it is computed per rank, and averaged by the
    number of its updates.

    Args:
        output_transform: turns the step's output into the input of `update`. By default a `(prediction, target)` pair
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
    updates_inner_separately: bool = False  # whether each metric inside it is updated separately
    shows_live: bool = False  # whether its value can be read while the epoch is under way
    adds_to_no_graph: bool = False  # whether `update` makes sure of that; if not, an engine turns gradients off
    # The metric whose `update` updates this one: a user's subclass of a derived metric may have its own methods.
    updated_by: "Metric | None" = None
    _states: Mapping[str, StateSpec] = {}

    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        if output_transform is not None and not callable(output_transform):
            raise TypeError(f"output_transform={output_transform!r} must be callable, as output_transform(output).")
        self.has_own_transform = output_transform is not None
        self.transform = self.default_transform if output_transform is None else output_transform

    has_own_transform: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A reduction needs to know whether a rank saw anything, and an `update` that a user wrote, here or in a mix-in,
        # need not count that.
        wrapped = wrap_methods(cls, Metric)
        if {"update", "default_transform"} & {*wrapped, *cls.__dict__} and "adds_to_no_graph" not in cls.__dict__:
            cls.adds_to_no_graph = False  # a base class says it only for its own `update`

    def default_transform(self, output: Any) -> Any:
        """The `output_transform` that is used if none is given."""
        return prediction_and_target(output)

    def add_state(self, name: str, default: object, reduce: StateOp = "sum") -> None:
        """Declare a state: the attribute `name`, which is `default` after `reset()`, and is reduced over the ranks.

        Args:
            default: a number or a tensor; `[]` for "cat". An empty tensor stands for a shape that the first
                update gives.
            reduce: "sum", "min", "max"; "mean": the plain mean over the ranks that saw anything; "cat": a list of
                tensors, concatenated along the first dimension; "gather": the ranks' tensors, stacked, (ranks, ...);
                "samples": a sum in which ranks that share their samples, on a mesh with `cp`, count once. Ranks with
                the same data and tokens (`tp`, `pp`) always count as one.

        Raises:
            ValueError: an unknown `reduce`, or a default that does not fit it. TypeError: not a number or a tensor.
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
        """The declared states by name; empty if the metric declares nothing."""
        return self._states

    def reset(self) -> None:
        """Set the states to their defaults."""
        for name, spec in self._states.items():
            setattr(self, name, _fresh(spec.default))
        self.num_updates = 0

    @abstractmethod
    def update(self, output: Any) -> None:
        """Add one step's output, after `output_transform`. Must not wait for the device."""

    @abstractmethod
    def compute(self) -> MetricValue:
        """The value for the samples of this rank since the last `reset()`.

        Raises:
            NotComputableError: no sample was seen.
        """

    def with_states(self, values: Mapping[str, object]) -> "Metric":
        """A copy with `values` as its states. The metric itself is not changed."""
        reduced = copy(self)
        for name, value in values.items():
            setattr(reduced, name, value)
        return reduced

    def flush(self) -> None:  # noqa: B027 - most have nothing to do
        """Bring the states up to date before a reduction or a checkpoint reads them, as with the time of a clock."""

    def live_value(self) -> MetricValue:
        """The present value of this rank, if `shows_live`. It is read while the epoch is under way."""
        return self.compute()

    def has_live_value(self) -> bool:
        """Whether there is a present value. Must not wait for the device."""
        return self.num_updates > 0

    def num_counted(self) -> torch.Tensor | float | None:
        """The number of values in the mean, as a number or a tensor; None if the value is not such a mean."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_settings(self)})"

    # -- composition ---------------------------------------------------------------------------------------------

    def metrics_within(self) -> "tuple[AnyMetric, ...]":
        """The metrics inside this one, which its update updates, too."""
        return ()

    def stateful_metrics(self) -> tuple["Metric", ...]:
        """The metrics with the states from which this one is computed: itself, unless it is made of others."""
        return (self,)

    def evaluate(self, reduced: Mapping[int, Any]) -> MetricValue:
        """The value, given the reduced copies of the stateful metrics that it reads, by their `id`."""
        value: MetricValue = reduced[id(self)].compute()
        return value

    def can_lead(self, other: "Metric") -> bool:
        """Whether it can lead a compute group with `other`: its states hold all that `other` would count."""
        return False

    def read_from(self, stateful: "Metric", leader: "Metric") -> None:  # noqa: B027 - most read no metric but themselves
        """Read `leader`, of the same compute group, instead of `stateful` from now on."""

    def __add__(self, other: Any) -> "Metric":
        return _function(operator.add, self, other)

    def __radd__(self, other: Any) -> "Metric":
        return _function(operator.add, other, self)

    def __sub__(self, other: Any) -> "Metric":
        return _function(operator.sub, self, other)

    def __rsub__(self, other: Any) -> "Metric":
        return _function(operator.sub, other, self)

    def __mul__(self, other: Any) -> "Metric":
        return _function(operator.mul, self, other)

    def __rmul__(self, other: Any) -> "Metric":
        return _function(operator.mul, other, self)

    def __truediv__(self, other: Any) -> "Metric":
        return _function(_divided, self, other)

    def __rtruediv__(self, other: Any) -> "Metric":
        return _function(_divided, other, self)

    def __pow__(self, other: Any) -> "Metric":
        return _function(operator.pow, self, other)

    def __neg__(self) -> "Metric":
        return _function(operator.neg, self)

    def __abs__(self) -> "Metric":
        return _function(abs, self)

    def __getitem__(self, index: Any) -> "Metric":
        return _function(operator.getitem, self, index)


def _fresh(default: Any) -> Any:
    if isinstance(default, torch.Tensor):
        return default.detach().clone()
    return list(default) if isinstance(default, list) else default


def _function(function: Callable[..., Any], *operands: Any) -> Metric:
    from dengine.metrics.core.function import MetricFunction  # a metric itself: it cannot be read before this module

    return MetricFunction(function, *operands)


def _divided(first: Any, second: Any) -> Any:
    """`first / second` with the rules of tensors: 0 / 0 is nan, not an error."""
    try:
        return first / second
    except ZeroDivisionError:
        return float(torch.tensor(first, dtype=torch.float64) / second)
