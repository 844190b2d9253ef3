"""Precision, recall, F1 and the confusion matrix, all computed from counts that are made once for an engine."""

from abc import abstractmethod
from typing import Literal, TypeAlias

import torch

from dengine.metrics.builtin.class_counts import Average, ClassCounts, check_average, class_average
from dengine.metrics.builtin.label_metric import LabelMetric
from dengine.metrics.builtin.labels import ClassSettings, Task, foreign_keywords
from dengine.metrics.builtin.sample_ratios import SampleRatios
from dengine.metrics.core.derived import DerivedMetric
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.types import MetricValue

__all__ = ["ConfusionMatrix", "F1Score", "Precision", "Recall"]

AverageOrAuto: TypeAlias = Average | Literal["auto"]


class _ClassRatio(DerivedMetric):
    """Base class of metrics that are a ratio of counts in each class, averaged over the classes."""

    @foreign_keywords
    def __init__(
        self,
        task: Task | None = None,
        num_classes: int | None = None,
        *,
        average: AverageOrAuto = "auto",
        threshold: float = 0.5,
        ignore_index: int | None = None,
        output_transform: OutputTransform | None = None,
    ) -> None:
        if average != "auto":
            check_average(average, task)
        settings = ClassSettings(task or "multiclass", num_classes, threshold, ignore_index)
        kind = SampleRatios if average == "samples" else ClassCounts
        stateful: LabelMetric = kind(settings, type(self).__name__, output_transform=output_transform)
        super().__init__(stateful, output_transform)
        self._is_positive_only = average == "auto" and task == "binary"
        self._average: Average = "macro" if average == "auto" else average

    index: int  # of the value among the means of `SampleRatios`

    @abstractmethod
    def part_and_whole(self, counts: ClassCounts) -> tuple[torch.Tensor, torch.Tensor]:
        """The numerators and denominators, (C,) each."""

    def value_of(self, stateful: Metric) -> MetricValue:
        if isinstance(stateful, SampleRatios):
            return float(stateful.means(type(self).__name__)[self.index])
        assert isinstance(stateful, ClassCounts)
        stateful.check(type(self).__name__)
        part, whole = self.part_and_whole(stateful)
        if self._is_positive_only:
            return class_average(part[1:], whole[1:], stateful, "micro")
        return class_average(part, whole, stateful, self._average)


class Precision(_ClassRatio):
    """The share of the samples predicted to be in a class that are in it.

    Shapes: `(N, C, ...)` scores, or `(N, ...)` predicted labels with `num_classes=`, with `(N, ...)` labels. With
        scores, targets of the same shape that add up to 1 are probabilities, and the likeliest class is the label.
        task="binary": `(N, ...)` or `(N, 1, ...)` scores, or labels, with `(N, ...)` targets of 0 and 1.
        task="multilabel": `(N, C, ...)` scores, or labels, with targets of the same shape.
    Cost: no wait for the device; (3, C) counts. Attached to one engine, `Precision`, `Recall`, `F1Score`,
        `ConfusionMatrix` and an averaged `Accuracy` of the same task, num_classes, threshold, ignore_index and
        output_transform are counted once.
    Source: `sklearn.metrics.precision_score`, with zero_division=0.

    Args:
        task: None is "multiclass".
        num_classes: None takes it from the first scores.
        average: "micro" counts all classes together; "macro" is the plain mean over the classes that occur in targets
            or predictions (in a multilabel task: over all), "weighted" is weighted by the frequency in the targets;
            "samples" is, in a multilabel task, the mean over samples of the value for each one's labels; None gives
            `(C,)`, 0.0 for a class that does not occur. "auto", the default, is the positive class alone if
            task="binary", else "macro".
        threshold: a binary or multilabel score above it means 1; 0.0 is right for logits.
        ignore_index: a target that is left out, also among the labels of a multilabel sample. It may be a class.

    Raises:
        ValueError: `update` got shapes that do not fit, or `compute` finds, on any rank, a label outside the classes,
            targets that are no probabilities, or scores that are nan. NotComputableError: no sample was
            seen.

    Example:
        >>> metric = Precision(num_classes=3, average=None)
        >>> metric.update((torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2])))
        >>> metric.compute().tolist()
        [0.5, 1.0, 1.0]
    """

    index = 0

    def part_and_whole(self, counts: ClassCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return counts.true_positives, counts.predicted


class Recall(_ClassRatio):
    """The share of the samples in a class that were predicted to be in it. See `Precision` for the arguments and
    errors.

    Source: `sklearn.metrics.recall_score`, with zero_division=0.

    Example:
        >>> metric = Recall("binary")
        >>> metric.update((torch.tensor([0.9, 0.2, 0.7, 0.4]), torch.tensor([1, 0, 0, 1])))
        >>> metric.compute()
        0.5
    """

    index = 1

    def part_and_whole(self, counts: ClassCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return counts.true_positives, counts.actual


class F1Score(_ClassRatio):
    """The harmonic mean of precision and recall, within each class. See `Precision` for the arguments and errors.

    Its average over classes is not the harmonic mean of averaged precision and recall; for that, write
    `2 * p * r / (p + r)` with two metrics.
    Source: `sklearn.metrics.f1_score`, with zero_division=0.

    Example:
        >>> metric = F1Score("multilabel", average="micro")
        >>> metric.update((torch.tensor([[0.9, 0.2], [0.7, 0.8]]), torch.tensor([[1, 0], [0, 1]])))
        >>> metric.compute()
        0.8
    """

    index = 2

    def part_and_whole(self, counts: ClassCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * counts.true_positives, counts.predicted + counts.actual


class ConfusionMatrix(DerivedMetric):
    """How often samples of each class (rows: targets) were predicted as each class (columns).

    Shapes: those of `Precision`. Gives (C, C) int64, or (C, 2, 2) if task="multilabel", one
        `[[true negatives, false positives], [false negatives, true positives]]` for each label.
    Cost: no wait for the device; O(N) an update and (C, C) counts, which `Precision` and its like then read too.
    Source: `sklearn.metrics.confusion_matrix` with labels=range(C), and `multilabel_confusion_matrix`.

    Raises:
        The same errors as `Precision`.

    Example:
        >>> metric = ConfusionMatrix(num_classes=2)
        >>> metric.update((torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])))
        >>> metric.compute()
        tensor([[1, 1],
                [0, 1]])
    """

    @foreign_keywords
    def __init__(
        self,
        task: Task | None = None,
        num_classes: int | None = None,
        *,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        output_transform: OutputTransform | None = None,
    ) -> None:
        settings = ClassSettings(task or "multiclass", num_classes, threshold, ignore_index)
        stateful = ClassCounts(settings, "ConfusionMatrix", has_matrix=True, output_transform=output_transform)
        super().__init__(stateful, output_transform)

    def value_of(self, stateful: Metric) -> MetricValue:
        assert isinstance(stateful, ClassCounts)
        stateful.check("ConfusionMatrix")
        return stateful.matrix.clone()  # a copy: outside of an engine it would be the state itself
