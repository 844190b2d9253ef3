"""A metric computed on each rank, whose values are then reduced; as in `DistributedMetric(Accuracy(), "mean")`."""

from typing import Any, Literal, TypeAlias

import torch

from dengine.metrics.accuracy import Accuracy
from dengine.metrics.metric import Metric
from dengine.types import MetricValue

__all__ = ["DistributedAccuracy", "DistributedMetric", "ValueOp"]

ValueOp: TypeAlias = Literal["mean", "sum", "max", "min"]
_VALUE_OPS = ("mean", "sum", "max", "min")


class DistributedMetric(Metric):
    """`base_metric` computed on each rank, and its values reduced over the ranks by the engine.

    A rank that saw nothing is not counted. Where all ranks saw nothing, the value is not computable.

    Args:
        base_metric: any metric; it is updated with what its own `output_transform` gives.
        reduce_op: "mean" is weighted by the samples that each rank saw, so that a mean over samples (accuracy, loss)
            is exact on uneven shards; "sum", "max" and "min" are plain.
        device: where predictions and targets are moved to before each update; None leaves them where they are.

    Raises:
        ValueError: an unknown `reduce_op`. TypeError: `base_metric` has no `reset`, `update` and `compute`.
    """

    def __init__(self, base_metric: Any, reduce_op: ValueOp = "mean", device: torch.device | str | None = None) -> None:
        if reduce_op not in _VALUE_OPS:
            raise ValueError(f"reduce_op={reduce_op!r} must be one of {', '.join(_VALUE_OPS)}.")
        if not all(callable(getattr(base_metric, name, None)) for name in ("reset", "update", "compute")):
            raise TypeError(f"DistributedMetric() takes a metric (reset, update, compute), but got {base_metric!r}.")
        transform = getattr(base_metric, "transform", None)
        super().__init__(transform)
        if isinstance(base_metric, Metric):
            self.transform = transform  # None too: a base without one gets the whole output
            self.has_own_transform = base_metric.has_own_transform
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
        if isinstance(self._base, Metric) or not isinstance(output, tuple):
            self._base.update(output)
        else:
            self._base.update(*output)
        self._num_samples += _num_samples(output)

    def compute(self) -> MetricValue:
        """This rank's value; the engine reduces it over the ranks."""
        value: MetricValue = self._base.compute()
        return value


class DistributedAccuracy(DistributedMetric):
    """`DistributedMetric(Accuracy(**kwargs), "mean", device)`."""

    def __init__(self, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(Accuracy(**kwargs), "mean", device)


def _moved(output: Any, device: torch.device | None) -> Any:
    if device is None:
        return output
    if isinstance(output, torch.Tensor):
        return output.to(device)
    if isinstance(output, (tuple, list)):
        return type(output)(_moved(part, device) for part in output)
    if isinstance(output, dict):
        return {key: _moved(part, device) for key, part in output.items()}
    return output


def _num_samples(output: Any) -> int:
    """Samples in one update: the first dimension of the last tensor of a pair (the target), 1 for numbers."""
    parts = (
        list(output.values()) if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    )
    tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.ndim]
    return int(tensors[-1].shape[0]) if tensors else 1
