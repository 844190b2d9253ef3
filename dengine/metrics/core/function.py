"""Metrics that are a function of the values of other metrics, as arithmetic between metrics gives them."""

from collections.abc import Callable, Mapping
from typing import Any

from dengine.metrics.core.kinds import (
    AnyMetric,
    evaluated,
    is_metric,
    shows_live,
    stateful_of,
    updated_through,
)
from dengine.metrics.core.metric import Metric
from dengine.metrics.core.updates import default_transform, update_of
from dengine.types import MetricValue

__all__ = ["MetricFunction"]


class MetricFunction(Metric):
    """A function of the values of metrics, over the samples of all ranks. `2 * p * r / (p + r)` is one, too.

    It takes any metrics that `add_metric` takes. Each is updated once, however many functions read it, and may also be
    added under a name of its own. If the function gives a mapping, its entries become `name/key` in
    `engine.state.metrics`.

    Cost: that of the metrics; the function is called once an epoch, on every rank.

    Args:
        function: takes the metrics' values in their order: floats, and tensors on the CPU.
        metrics: at least one metric; numbers among them are passed to the function as they are.

    Raises:
        TypeError: `function` cannot be called, or there is no metric.

    Example:
        >>> import torch
        >>> from dengine.metrics import MAE, RMSE
        >>> spread = MetricFunction(lambda rmse, mae: {"rmse": rmse, "ratio": rmse / mae}, RMSE(), MAE())
        >>> spread.update((torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])))
        >>> spread.compute()
        {'rmse': 1.0, 'ratio': 1.0}
    """

    updates_inner_separately = True

    def __init__(self, function: Callable[..., Any], *metrics: Any) -> None:
        if not callable(function) or is_metric(function):
            raise TypeError(f"MetricFunction() takes a function and then metrics, but the first is {function!r}.")
        self._function = function
        self._operands = metrics
        if not self.metrics_within():
            raise TypeError(f"MetricFunction() needs at least one metric, but got {metrics!r}.")

    def metrics_within(self) -> tuple[AnyMetric, ...]:
        return tuple(operand for operand in self._operands if is_metric(operand))

    def stateful_metrics(self) -> tuple[Any, ...]:
        found = [stateful for part in self.metrics_within() for stateful in stateful_of(part)]
        return tuple({id(stateful): stateful for stateful in found}.values())

    @property
    def shows_live(self) -> bool:  # type: ignore[override]
        return all(map(shows_live, self.stateful_metrics()))

    def has_live_value(self) -> bool:
        return all(stateful.has_live_value() for stateful in self.stateful_metrics())

    def reset(self) -> None:
        for stateful in self.stateful_metrics():
            updated_through(stateful).reset()

    def update(self, output: object) -> None:
        for stateful in map(updated_through, self.stateful_metrics()):
            update_of(stateful, default_transform(stateful))(output)

    def read_from(self, stateful: Metric, leader: Metric) -> None:
        for part in self.metrics_within():
            if isinstance(part, Metric):
                part.read_from(stateful, leader)

    def compute(self) -> MetricValue:
        return self.evaluate({id(stateful): stateful for stateful in self.stateful_metrics()})

    def live_value(self) -> MetricValue:
        return self.evaluate({id(stateful): _LiveReader(stateful) for stateful in self.stateful_metrics()})

    def evaluate(self, reduced: Mapping[int, Any]) -> MetricValue:
        values = [evaluated(part, reduced) if is_metric(part) else part for part in self._operands]
        result: MetricValue = self._function(*values)
        return result

    def __repr__(self) -> str:
        name = getattr(self._function, "__name__", type(self._function).__name__).lstrip("_")
        return f"MetricFunction({', '.join([name, *map(repr, self._operands)])})"


class _LiveReader:
    """A stateful metric whose value is read while its epoch is under way."""

    def __init__(self, stateful: Metric) -> None:
        self._stateful = stateful

    def compute(self) -> MetricValue:
        return self._stateful.live_value()
