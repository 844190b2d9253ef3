"""Precision, recall and F1 within each sample of a multilabel task, averaged over the samples."""

import torch

from dengine.errors import NotComputableError
from dengine.metrics.builtin.label_metric import LabelMetric
from dengine.metrics.builtin.labels import ClassSettings
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.types import accumulator_dtype

__all__ = ["SampleRatios"]


class SampleRatios(LabelMetric):
    """Sums over samples of the precision, the recall and the F1 score of each sample's labels. 0 / 0 is 0.

    State: (3,) float64 and the number of samples; a sample whose labels are all ignored does not count.
    """

    ratio_sums: torch.Tensor
    total: torch.Tensor | int

    def __init__(self, settings: ClassSettings, name: str, *, output_transform: OutputTransform | None = None) -> None:
        super().__init__(output_transform)
        self.settings = settings
        self._name = name
        self.add_state("ratio_sums", torch.zeros(3, dtype=torch.float64))
        self.add_state("total", 0)

    def can_lead(self, other: Metric) -> bool:
        return isinstance(other, SampleRatios) and self.settings == other.settings

    def take_in(self, output: object) -> None:
        answers = self.settings.read(output, self._name)
        self.watch_all(answers)
        predicted, target = answers.predicted == 1, answers.target == 1
        if answers.kept is None:
            self.total = self.total + target[:, 0].numel()
        else:
            predicted, target = predicted & answers.kept, target & answers.kept
            self.total = self.total + answers.kept.any(1).sum()
        both_NX, predicted_NX, actual_NX = (part.sum(1) for part in (predicted & target, predicted, target))
        wholes = (predicted_NX, actual_NX, (predicted_NX + actual_NX) / 2)
        dtype = accumulator_dtype(target.device)
        ratios = [both_NX.to(dtype) / whole_NX.clamp(min=0.5) for whole_NX in wholes]
        sums = torch.stack([ratio.sum() for ratio in ratios])
        self.ratio_sums = self.ratio_sums.to(sums.device, sums.dtype, non_blocking=True) + sums

    def num_counted(self) -> int:
        self.flush()
        return int(self.total)

    def compute(self) -> torch.Tensor:
        """The mean precision, recall and F1 score, (3,).

        Raises:
            NotComputableError: no sample was seen. ValueError: a target is neither 0 nor 1.
        """
        return self.means(self._name)

    def means(self, metric: str) -> torch.Tensor:
        self.flush()
        if not (total := int(self.total)):
            raise NotComputableError("no sample was seen on any rank")
        self.check_labels(2, metric)
        return self.ratio_sums.cpu().double() / total
