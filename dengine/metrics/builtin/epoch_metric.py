"""A metric that is a function of all predictions and targets of an epoch, from all ranks."""

from collections.abc import Callable
from typing import Any

import torch

from dengine.errors import NotComputableError
from dengine.metrics.core.inputs import as_pair, shape_error
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.types import is_short_float

__all__ = ["EpochMetric"]


class EpochMetric(Metric):
    """Computes `function(predictions, targets)` once an epoch, on every rank, with the data of all ranks.

    It is for values that no sums can give, such as scikit-learn's ranking scores:
    `EpochMetric(lambda predictions, targets: roc_auc_score(targets, predictions))`.

    Shapes: predictions and targets with the same first dimension N, any dimensions after it, which must not change
        from batch to batch; a number is one row. The function gets them concatenated, rank by rank, as tensors on the
        CPU (floats of 16 bits as float32, which numpy has). It gives a number, a tensor, or a mapping of them, whose
        entries become `name/key` in `engine.state.metrics`.
    Cost: no wait for the device before the epoch's end, but all predictions and targets of the epoch are kept, and then
        gathered on every rank in one exchange.

    Raises:
        TypeError: `function` cannot be called, or `update` got no pair. ValueError: shapes that do not go together.
        NotComputableError: no sample was seen.

    Example:
        >>> metric = EpochMetric(lambda predictions, targets: (predictions - targets).abs().median())
        >>> metric.update((torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])))
        >>> metric.update((torch.tensor([3.0]), torch.tensor([2.0])))
        >>> metric.compute()
        tensor(1.)
    """

    predictions: Any  # a list of tensors; one tensor once reduced
    targets: Any

    def __init__(
        self,
        function: Callable[[torch.Tensor, torch.Tensor], object],
        output_transform: OutputTransform | None = None,
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"function={function!r} must be a function (predictions, targets) -> value.")
        super().__init__(output_transform)
        self._function = function
        self.add_state("predictions", [], reduce="cat")
        self.add_state("targets", [], reduce="cat")

    def update(self, output: object) -> None:
        pair = as_pair(output, "EpochMetric")
        prediction, target = pair
        if prediction.shape[0] != target.shape[0]:
            raise shape_error("EpochMetric", prediction, target, "the same number of samples in both")
        for rows, kept in zip(pair, (self.predictions, self.targets), strict=True):
            if kept and rows.shape[1:] != kept[0].shape[1:]:
                raise ValueError(
                    f"EpochMetric got a batch of shape {tuple(rows.shape)}, but one of shape {tuple(kept[0].shape)} "
                    "before, which cannot be joined: all dimensions but the first must stay the same."
                )
        # Copies, as the tensors that a step gives may be written again by the next one.
        self.predictions.append(prediction.clone())
        self.targets.append(target.clone())

    def compute(self) -> Any:
        predictions, targets = _joined(self.predictions), _joined(self.targets)
        if not len(predictions):
            raise NotComputableError("no sample was seen on any rank")
        return self._function(predictions, targets)


def _joined(parts: Any) -> torch.Tensor:
    if isinstance(parts, list):
        parts = torch.cat(parts) if parts else torch.empty(0)
    rows: torch.Tensor = parts.cpu()
    return rows.float() if is_short_float(rows) else rows
