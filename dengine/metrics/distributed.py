"""A metric computed on each rank, whose values are then reduced; as in `DistributedMetric(Accuracy(), "mean")`."""

from typing import Any, Literal, TypeAlias

import torch

from dengine.metrics.accuracy import Accuracy
from dengine.metrics.metric import Metric
from dengine.metrics.transform import is_torchmetrics, prediction_and_target
from dengine.types import MetricValue

__all__ = ["DistributedAccuracy", "DistributedMetric", "ValueOp"]

ValueOp: TypeAlias = Literal["mean", "sum", "max", "min"]
_VALUE_OPS = ("mean", "sum", "max", "min")


class DistributedMetric(Metric):
    """`base_metric` computed on each rank, and its values reduced over the ranks by the engine.

    A rank that saw nothing is not counted. Where all ranks saw nothing, the value is not computable.

    Cost: that of `base_metric`; its value and weight ride in the engine's all-reduce ("max" and "min": in one more).

    Args:
        base_metric: any metric; it is updated with what its own `output_transform` gives.
        reduce_op: "mean" is weighted by the samples that each rank saw (the first dimension of the target), so that a
            mean over samples (accuracy, loss) is exact on uneven shards; "sum", "max" and "min" are plain.
        device: where predictions and targets are moved to before each update; None leaves them where they are.

    Raises:
        ValueError: an unknown `reduce_op`. TypeError: `base_metric` has no `reset`, `update` and `compute`.

    Example:
        >>> metric = DistributedMetric(Accuracy(), reduce_op="max")      # the best rank's
        >>> metric.update((torch.tensor([1, 0, 2]), torch.tensor([1, 0, 0])))
        >>> round(metric.compute(), 4)
        0.6667
    """

    def __init__(self, base_metric: Any, reduce_op: ValueOp = "mean", device: torch.device | str | None = None) -> None:
        if reduce_op not in _VALUE_OPS:
            raise ValueError(f"reduce_op={reduce_op!r} must be one of {', '.join(_VALUE_OPS)}.")
        if not all(callable(getattr(base_metric, name, None)) for name in ("reset", "update", "compute")):
            raise TypeError(f"DistributedMetric() takes a metric (reset, update, compute), but got {base_metric!r}.")
        super().__init__()
        self.has_own_transform = getattr(base_metric, "has_own_transform", False)
        if not is_torchmetrics(base_metric):
            # None too: a base without one gets the whole output, as it does on its own.
            self.transform = base_metric.transform if isinstance(base_metric, Metric) else None
        self.reduce_op: ValueOp = reduce_op
        self._base = base_metric
        self._device = None if device is None else torch.device(device)
        self._num_samples = 0

    @property
    def weight(self) -> float:
        """What this rank's value counts: its samples for a mean, else whether there were any updates."""
        return float(self._num_samples if self.reduce_op == "mean" else min(self.num_updates, 1))

    def reset(self) -> None:
        self._base.reset()
        self._num_samples = 0

    def update(self, output: Any) -> None:
        output = _moved(output, self._device)
        if is_torchmetrics(self._base) and isinstance(output, (tuple, list)):
            self._base.update(*output)
        else:
            self._base.update(output)
        self._num_samples += _num_samples(output)

    def compute(self) -> MetricValue:
        """This rank's value; the engine reduces it over the ranks."""
        value: MetricValue = self._base.compute()
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


def _moved(output: Any, device: torch.device | None) -> Any:
    if device is None:
        return output
    if isinstance(output, torch.Tensor):
        return output.to(device)
    if isinstance(output, (tuple, list)):
        parts = [_moved(part, device) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if isinstance(output, dict):
        return {key: _moved(part, device) for key, part in output.items()}
    return output


def _num_samples(output: Any) -> int:
    """Samples in one update: the first dimension of the last tensor of a pair (the target), 1 for numbers."""
    output = prediction_and_target(output)
    if isinstance(output, dict):
        parts = list(output.values())
    else:
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
    tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.ndim]
    return int(tensors[-1].shape[0]) if tensors else 1
