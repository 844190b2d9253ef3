"""The mean of a loss function over samples. Each batch is weighted by the number by which its mean was divided."""

from collections.abc import Callable
from typing import Any

import torch

from dengine.metrics.builtin.average import Amount, WeightedMean, accumulable
from dengine.metrics.core.batch_size import cannot_count, num_samples
from dengine.metrics.core.class_loss import class_loss, num_probabilities, option, source_of, weight_of
from dengine.metrics.core.inputs import (
    as_real,
    as_tensor,
    checked_ignore_index,
    is_kept,
    is_python_number,
    what_it_got,
)
from dengine.metrics.core.metric import OutputTransform
from dengine.metrics.core.transform import prediction_and_target
from dengine.types import is_short_float, summable

__all__ = ["Loss"]


class Loss(WeightedMean):
    """The mean of `loss_fn(prediction, target)` over the samples of all ranks.

    Shapes: those that `loss_fn` takes. It gives the mean over the batch, or, with reduction="none", one loss for each
        sample or element.
    Cost: that of `loss_fn`, without gradients; no wait for the device; two numbers.

    The weight of a batch is the number by which its mean was divided:

    - for `cross_entropy` and `nll_loss` (as a function, a module, or `functools.partial` of one), the number of labels
      that are not their `ignore_index` or, with class weights and reduction="mean", the sum of these labels' weights;
    - with `ignore_index=`, the number of elements of the target that differ from it;
    - for any other function, the first dimension of the target, or of the tensors, arrays and lists in it; 1 for a
      number.

    Args:
        batch_size: a function of the target that gives the weight of the batch, a number or a 0-d tensor:
            `batch_size=lambda target: weight[target].sum()` for a function with class weights of its own.
        ignore_index: a target that does not count. `loss_fn` must leave it out of its mean itself; if it gives one loss
            for each element, these are left out here.

    Raises:
        TypeError: `loss_fn` cannot be called, `update` got no (prediction, target) pair, the number of samples cannot
        be found in it, or the loss is complex. ValueError: a `loss_fn` with reduction="sum" or another `ignore_index`,
        or `batch_size` beside `ignore_index`. NotComputableError: no sample was seen.

    Example:
        >>> metric = Loss(torch.nn.functional.mse_loss)
        >>> metric.update((torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])))
        >>> metric.update((torch.tensor([3.0]), torch.tensor([0.0])))
        >>> metric.compute()
        3.0
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Any],
        output_transform: OutputTransform | None = None,
        *,
        batch_size: Callable[[Any], Any] | None = None,
        ignore_index: int | None = None,
    ) -> None:
        for name, function in (("loss_fn", loss_fn), ("batch_size", batch_size)):
            is_wrong = not callable(function) or isinstance(function, type)
            if is_wrong and (function is not None or name == "loss_fn"):
                raise TypeError(f"{name}={function!r} must be a function, or an instance of a loss module.")
        super().__init__(output_transform)
        self._loss_fn = loss_fn
        self._batch_size = batch_size
        self._ignore_index = checked_ignore_index(ignore_index)
        self._source = class_loss(loss_fn)
        self._check(source_of(loss_fn))

    def update(self, output: object) -> None:
        prediction, target = _pair(output)
        with torch.no_grad():
            kept, count = self._kept_and_count(prediction, target)
            if not isinstance(count, torch.Tensor) and not count:
                return  # the mean over an empty batch is nan
            if is_short_float(prediction):
                prediction = prediction.float()  # autocast computes losses in float32
            loss = self._loss_fn(prediction, target)
            if not is_python_number(loss):
                loss = as_real(loss, "Loss")
                if loss.ndim:
                    loss = _mean_of_each(loss, kept, count)
            self._add_mean(loss, count)

    def compute(self) -> float:
        return self.mean()

    def _check(self, source: object) -> None:
        """Check `loss_fn`. Raises: ValueError: it does not give a mean over the elements that are counted here."""
        if self._batch_size is not None:
            if self._ignore_index is not None:
                raise ValueError("Loss() takes batch_size= or ignore_index=, not both: each says what a batch counts.")
            return
        if option(source, "reduction") == "sum":
            raise ValueError(
                'Loss() takes a loss_fn that gives the mean over its batch, but this one has reduction="sum": pass '
                'reduction="mean", or batch_size=, what the sum of a batch counts for.'
            )
        if self._source is None or self._ignore_index is None:
            return
        own = option(source, "ignore_index")
        if own != self._ignore_index:
            raise ValueError(
                f"Loss(ignore_index={self._ignore_index}) has a loss_fn with ignore_index={own}, whose means have "
                "other targets in them: give both the same one, as in "
                f"CrossEntropyLoss(ignore_index={self._ignore_index})."
            )

    def _kept_and_count(self, prediction: Any, target: Any) -> tuple[torch.Tensor | None, Amount]:
        """The elements of the target that count (None: all), and the weight of the batch."""
        if self._batch_size is not None:
            return None, summable(self._batch_size(target))
        weight = None
        ignore_index = self._ignore_index
        if self._source is not None and isinstance(target, torch.Tensor):
            if target.is_floating_point():
                return None, self._num_probabilities(target)
            ignore_index = option(self._source, "ignore_index")
            weight = option(self._source, "weight") if option(self._source, "reduction") == "mean" else None
        if ignore_index is None:
            return None, _first_dimension(prediction, target)
        labels = as_tensor(target, "Loss")
        if not labels.numel():
            return None, 0
        kept = is_kept(labels, ignore_index)
        count = kept.sum() if weight is None else weight_of(labels, kept, weight)
        return kept, count.item() if count.is_cpu else count

    def _num_probabilities(self, target: torch.Tensor) -> int:
        if self._ignore_index is not None:
            raise ValueError(
                f"Loss(ignore_index={self._ignore_index}) got targets of shape {tuple(target.shape)} that are class "
                "probabilities; only labels of a whole-number dtype can be left out."
            )
        return num_probabilities(target)

    def _add_mean(self, mean: Any, count: Amount) -> None:
        total = self.value_sum
        if isinstance(count, torch.Tensor):
            # The mean of nothing is nan, and nan * 0 is too.
            self.add(torch.where(count == 0, 0.0, accumulable(torch.as_tensor(mean)) * count), count)
        elif not isinstance(mean, torch.Tensor):
            self.add(mean * count, count)
        elif isinstance(total, torch.Tensor) and total.device == mean.device:
            # In one operation: the sum's own dtype is the wider one.
            self.value_sum, self.count = torch.add(total, mean, alpha=count), self.count + count
        else:
            self.add(accumulable(mean) * count, count)


def _pair(output: object) -> tuple[Any, Any]:
    if not isinstance(output, (tuple, list)):
        output = prediction_and_target(output)
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        raise TypeError(
            f"Loss takes a (prediction, target) pair, but got {what_it_got(output)}: pass output_transform=, a "
            "function of the step's output that gives the pair."
        )
    prediction, target = output
    return prediction, target


def _first_dimension(prediction: Any, target: Any) -> int:
    samples = num_samples(target, prediction)
    if samples is None:
        got = f"a prediction of {type(prediction).__qualname__} and a target of {type(target).__qualname__}"
        raise cannot_count("Loss", got, "batch_size=, a function of the target that gives it")
    return samples


def _mean_of_each(losses: torch.Tensor, kept: torch.Tensor | None, count: Amount) -> torch.Tensor:
    """The mean of single losses, without those that do not count."""
    if kept is None or losses.numel() == 1:
        return accumulable(losses).mean()
    if losses.shape != kept.shape:
        raise ValueError(
            f"Loss with ignore_index= got losses of shape {tuple(losses.shape)} for targets of shape "
            f"{tuple(kept.shape)}; it takes one loss for each target, or their mean."
        )
    return torch.where(kept, accumulable(losses), 0.0).sum() / count
