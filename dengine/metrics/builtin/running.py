"""A running average over the last iterations."""

from collections.abc import Mapping
from typing import Any

import torch

from dengine.checks import number
from dengine.errors import NotComputableError
from dengine.metrics.builtin.average import accumulable, value_of
from dengine.metrics.core.batch_size import samples_or_one
from dengine.metrics.core.computed import checked
from dengine.metrics.core.kinds import AnyMetric, is_metric, is_tracker
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.metrics.core.transform import loss_value, prediction_and_target
from dengine.metrics.core.updates import takes_pair
from dengine.types import MetricValue

__all__ = ["RunningAverage"]


class RunningAverage(Metric):
    """The exponential average of this rank's values: `alpha * average + (1 - alpha) * value`, from the first value on.

    It is live: handlers see this rank's current average in `engine.state.metrics` at any event. At the end of the epoch
    it is the plain mean of the averages of all ranks that saw anything. `reset()` restarts it, so in an engine it
    covers one epoch.

    Shapes: a number or a 0-d tensor; a tensor `(N, ...)` gives its mean, and a mapping its `"loss"`. With `metric`, the
        input of that metric; if its value is a tensor, so is the average.
    Cost: no wait for the device; two numbers a rank. With `metric` its reset, update and compute in every iteration,
        which wait for the device as its `compute()` does.

    Args:
        alpha: the weight of the past, 0 <= alpha < 1; 0.98 looks back on about 50 values.
        metric: the average is that of its values for single batches: `RunningAverage(metric=Accuracy())`. It is reset
            for every batch, so add it to no engine.

    Raises:
        ValueError: `alpha` out of range, or `metric` has an `output_transform` and another one is given. TypeError:
        `metric` is not a metric, or `update` got something else (the message lists the keys of a mapping).
        NotComputableError: no value was seen.

    Example:
        >>> metric = RunningAverage(alpha=0.75)
        >>> metric.update(1.0)
        >>> metric.update(3.0)
        >>> metric.compute()
        1.5
    """

    shows_live = True
    average: Any  # a number or a tensor; (ranks, ...) once reduced
    num_values: Any  # int; (ranks,) once reduced

    def __init__(
        self, alpha: float = 0.98, *, metric: AnyMetric | None = None, output_transform: OutputTransform | None = None
    ) -> None:
        alpha = number("alpha", alpha)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha={alpha} must be at least 0 and less than 1.")
        if metric is not None and (not is_metric(metric) or is_tracker(metric)):
            raise TypeError(f"metric={metric!r} must be a metric (reset, update, compute).")
        if output_transform is not None and getattr(metric, "has_own_transform", False):
            raise ValueError(f"{metric!r} has an output_transform of its own: give it in one place, there or here.")
        super().__init__(output_transform)
        self.has_own_transform = self.has_own_transform or getattr(metric, "has_own_transform", False)
        self._alpha = alpha
        self._metric: Any = metric
        self._spreads = metric is not None and takes_pair(metric)
        self.add_state("average", 0.0, reduce="gather")
        self.add_state("num_values", 0, reduce="gather")

    def metrics_within(self) -> tuple[AnyMetric, ...]:
        return () if self._metric is None else (self._metric,)

    def default_transform(self, output: object) -> object:
        if self._metric is None:
            return loss_value(output)
        if isinstance(self._metric, Metric):
            return output if self._metric.transform is None else self._metric.transform(output)
        return prediction_and_target(output) if self._spreads else output

    def update(self, output: object) -> None:
        value = value_of(output, "RunningAverage") if self._metric is None else self._value_of_batch(output)
        if isinstance(value, torch.Tensor):
            if not value.numel():
                return
            value = accumulable(value) if self._metric is not None else accumulable(value).mean()
        if value is None:
            return
        is_first = self.num_values == 0
        self.average = value if is_first else self._alpha * self.average + (1 - self._alpha) * value
        self.num_values += 1

    def has_live_value(self) -> bool:
        return bool(self.num_values)

    def compute(self) -> MetricValue:
        has_values = torch.as_tensor(self.num_values).reshape(-1) > 0  # of each rank
        if not has_values.any():
            raise NotComputableError("no value was seen on any rank")
        average = self.average.cpu() if isinstance(self.average, torch.Tensor) else self.average
        averages = torch.as_tensor(average, dtype=torch.float64)
        if not isinstance(self.num_values, torch.Tensor):  # not reduced: of this rank alone
            averages = averages.unsqueeze(0)
        mean = averages[has_values].mean(0)
        return mean if mean.ndim else float(mean)

    def _value_of_batch(self, output: Any) -> Any:
        """The value of `metric` for this batch alone; None if the batch is empty."""
        self._metric.reset()
        if self._spreads and isinstance(output, (tuple, list)):
            self._metric.update(*output)
        else:
            self._metric.update(output)
        try:
            value = checked(self._metric.compute(), f"{type(self._metric).__name__} of RunningAverage")
        except (NotComputableError, ZeroDivisionError) as error:
            if isinstance(error, ZeroDivisionError) and samples_or_one(output):
                raise
            return None
        if isinstance(value, (Mapping, complex)) or (isinstance(value, torch.Tensor) and value.is_complex()):
            raise TypeError(
                f"RunningAverage(metric=) averages real numbers or tensors, but {type(self._metric).__name__} computed "
                f"a {type(value).__qualname__}: make one of it, by metric=MetricFunction(lambda value: ..., metric)."
            )
        return value
