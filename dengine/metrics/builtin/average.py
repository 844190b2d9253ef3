"""The mean of all values that the steps give."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from dengine.errors import NotComputableError
from dengine.metrics.core.inputs import as_real, as_tensor, is_python_number, what_it_got
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.metrics.core.transform import loss_value
from dengine.types import accumulator_dtype, summable

__all__ = ["Average", "WeightedMean", "accumulable", "sum_and_count", "value_of"]

Amount: TypeAlias = torch.Tensor | float  # a number, or a tensor that the device may still compute


class WeightedMean(Metric):
    """Base class of means: the sum and the number of values, both in 64 bits, whatever dtype a step gives."""

    value_sum: Amount
    count: Amount

    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        super().__init__(output_transform)
        self.add_state("value_sum", 0.0)
        self.add_state("count", 0)

    def add(self, value_sum: Amount, count: Amount) -> None:
        self.value_sum = self.value_sum + value_sum
        self.count = self.count + count

    def num_counted(self) -> Amount:
        return self.count

    def mean(self) -> float:
        count = float(self.count)
        if not count:
            raise NotComputableError("no sample was seen on any rank")
        return float(self.value_sum) / count


class Average(WeightedMean):
    """The mean of the values that the steps give, over all ranks.

    Shapes: a number or a 0-d tensor, one value; a tensor `(N, ...)`, as many values as it has elements; a pair
        `(value, count)` of these, in which the value is the mean of `count` samples (a count of 0 is skipped). A
        mapping gives its `"loss"`.
    Cost: no wait for the device; two numbers.

    Raises:
        TypeError: `update` got something else (the message lists the keys of a mapping). ValueError: a value and a
        count have different shapes. NotComputableError: no value was seen.

    Example:
        >>> metric = Average()
        >>> metric.update(1.0)
        >>> metric.update((4.0, 2))
        >>> metric.compute()
        3.0
    """

    adds_to_no_graph = True

    def default_transform(self, output: object) -> object:
        return loss_value(output)

    def update(self, output: Any) -> None:
        # The most frequent case, a loss, is cheap: on the CPU a tenth of the time of a tensor's sum, with the same
        # bits.
        is_loss = type(output) is torch.Tensor and not output.ndim and output.is_floating_point()
        if is_loss and output.is_cpu:
            self.add(output.item(), 1)
        elif is_loss and output.dtype is torch.float32 and type(self.value_sum) is torch.Tensor:
            # In one operation: the sum's own dtype is the wider one.
            self.add(output.detach() if output.requires_grad else output, 1)
        else:
            with torch.no_grad():
                self.add(*sum_and_count(output, "Average"))

    def compute(self) -> float:
        return self.mean()


def value_of(output: object, metric: str) -> Amount:
    """The value in `output`: a number, or a tensor of any shape.

    Raises:
        TypeError: it is neither, or is complex; the message lists the keys of a mapping and says what to do.
    """
    if is_python_number(output):
        return output
    if isinstance(output, (Mapping, str, tuple, list)) or output is None:
        raise TypeError(
            f"{metric} takes a number or a tensor, but got {what_it_got(output)}: pass output_transform=, a function "
            "of the step's output that gives the value."
        )
    return as_real(output, metric)


def sum_and_count(output: object, metric: str) -> tuple[Amount, Amount]:
    """The sum and the number of the values in `output`."""
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        value = value_of(output, metric)
        if isinstance(value, torch.Tensor):
            return accumulable(value).sum(), value.numel()
        return value, 1
    value, count = (value_of(part, metric) for part in output)
    if not isinstance(value, torch.Tensor) and not isinstance(count, torch.Tensor):
        # The mean loss of nothing is nan, and nan * 0 is too.
        return (value * count if count else 0.0), count
    return _weighted_tensors(as_tensor(value, metric), as_tensor(count, metric), metric)


def _weighted_tensors(value: torch.Tensor, count: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    if value.ndim and count.ndim and value.shape != count.shape:
        raise ValueError(
            f"{metric} got a value of shape {tuple(value.shape)} and a count of shape {tuple(count.shape)}; they must "
            "be of one shape, or one of them a number."
        )
    if value.device != count.device:
        device = value.device if count.device.type == "cpu" else count.device
        value, count = value.to(device, non_blocking=True), count.to(device, non_blocking=True)
    value, count = accumulable(value), summable(count)
    weighted = torch.where(count == 0, 0.0, value * count)
    if not weighted.ndim:
        return weighted, count
    return weighted.sum(), count.expand(weighted.shape).sum()


def accumulable(value: torch.Tensor) -> torch.Tensor:
    return value.to(accumulator_dtype(value.device))
