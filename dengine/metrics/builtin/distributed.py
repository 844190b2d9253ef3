"""Metrics that are computed on each rank, and whose values are then reduced over the ranks."""

from typing import Any, Literal, TypeAlias, get_args

import torch

from dengine import trees
from dengine.metrics.builtin.accuracy import Accuracy
from dengine.metrics.core.batch_size import samples_or_one
from dengine.metrics.core.kinds import AnyMetric, is_metric, is_tracker, shows_live
from dengine.metrics.core.metric import Metric
from dengine.metrics.core.updates import takes_pair
from dengine.types import MetricValue

__all__ = ["DistributedAccuracy", "DistributedMetric", "ValueOp"]

ValueOp: TypeAlias = Literal["mean", "sum", "max", "min"]
_VALUE_OPS = get_args(ValueOp)


class DistributedMetric(Metric):
    """Computes `base_metric` on each rank; the engine reduces its values over the ranks.

    A rank that saw nothing does not count. If no rank saw anything, the value is not computable.

    Cost: that of `base_metric`; its value and weight are part of the engine's all-reduce ("max" and "min": of
        another one).

    Args:
        base_metric: any metric; it is updated with the result of its own `output_transform`.
        reduce_op: "mean" is weighted by each rank's number of samples, so that a mean over samples (accuracy, loss) is
            exact on uneven shards. The numbers are the counts of a `base_metric` that keeps counts (`Average` of
            (value, count)), else samples (the first dimension of the target). "sum", "max" and "min" are plain.
        device: the device to which predictions and targets are moved before each update; None: they are not moved.

    Raises:
        ValueError: an unknown `reduce_op`. TypeError: `base_metric` has no `reset`, `update` and `compute`.

    Example:
        >>> metric = DistributedMetric(Accuracy(), reduce_op="max")      # the best rank's
        >>> metric.update((torch.tensor([1, 0, 2]), torch.tensor([1, 0, 0])))
        >>> round(metric.compute(), 4)
        0.6667
    """

    def __init__(
        self, base_metric: AnyMetric, reduce_op: ValueOp = "mean", device: torch.device | str | None = None
    ) -> None:
        if reduce_op not in _VALUE_OPS:
            raise ValueError(f"reduce_op={reduce_op!r} must be one of {', '.join(_VALUE_OPS)}.")
        if not is_metric(base_metric) or is_tracker(base_metric):
            raise TypeError(f"DistributedMetric() takes a metric (reset, update, compute), but got {base_metric!r}.")
        super().__init__()
        self.has_own_transform = getattr(base_metric, "has_own_transform", False)
        self._spreads = takes_pair(base_metric)
        if not self._spreads:
            # Also None: a base metric without one gets the whole output, as it does on its own.
            self.transform = base_metric.transform if isinstance(base_metric, Metric) else None
        self.reduce_op: ValueOp = reduce_op
        self._base: Any = base_metric
        self._device = None if device is None else torch.device(device)
        self._num_samples = 0

    @property
    def weight(self) -> float:
        """The weight of this rank's value: the number of samples of its mean, or 1; 0 without a sample.

        Waits for the device. For a mean with counts of its own (`Average`), it is these: they may differ from the
        number of samples, as numbers of tokens do.
        """
        if self.reduce_op != "mean":
            return float(min(self._num_samples, 1))
        counted = self._base.num_counted() if isinstance(self._base, Metric) else None
        return float(self._num_samples if counted is None else counted)

    @property
    def shows_live(self) -> bool:  # type: ignore[override]
        return shows_live(self._base)

    def has_live_value(self) -> bool:
        has_one: bool = self._base.has_live_value()
        return has_one

    @property
    def has_samples(self) -> bool:
        return self._num_samples > 0

    def metrics_within(self) -> tuple[AnyMetric, ...]:
        return (self._base,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base!r}, {self.reduce_op!r})"

    def reset(self) -> None:
        self._base.reset()
        self._num_samples = 0

    def update(self, output: object) -> None:
        output = _moved(output, self._device)
        if self._spreads and isinstance(output, (tuple, list)):
            self._base.update(*output)
        else:
            self._base.update(output)
        self._num_samples += samples_or_one(output)

    def compute(self) -> MetricValue:
        """This rank's value; the engine reduces it over the ranks."""
        value: MetricValue = self._base.compute()
        return value

    def live_value(self) -> MetricValue:
        value: MetricValue = self._base.live_value()
        return value


class DistributedAccuracy(DistributedMetric):
    """`DistributedMetric(Accuracy(**kwargs), "mean", device)`.

    Example:
        >>> metric = DistributedAccuracy()
        >>> metric.update((torch.tensor([1, 0]), torch.tensor([1, 1])))
        >>> metric.compute()
        0.5
    """

    def __init__(self, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(Accuracy(**kwargs), "mean", device)


def _moved(output: object, device: torch.device | None) -> Any:
    if device is None:
        return output
    return trees.map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, output)
