"""The counts from which precision, recall, F1 and the confusion matrix are computed, and averages over classes."""

from typing import Literal, TypeAlias

import torch

from dengine.errors import NotComputableError
from dengine.metrics.builtin.label_metric import LabelMetric
from dengine.metrics.builtin.labels import Answers, ClassSettings
from dengine.metrics.core.metric import Metric, OutputTransform

__all__ = ["Average", "ClassCounts", "check_average", "class_average"]

Average: TypeAlias = Literal["micro", "macro", "weighted", "samples", None]
_AVERAGES = ("micro", "macro", "weighted", "samples", None)


class ClassCounts(LabelMetric):
    """For each class: how often it was predicted correctly, was predicted, and was the target; or the whole matrix.

    State: (3, C) int64 counts, or (C, C) with `has_matrix`. A multilabel task needs only the former, and with an
        `ignore_index` a fourth row: the number of targets of each label that count.
    Cost: O(N) an update and nothing of O(C^2): an in-place scatter. A binary task counts as two classes.
    """

    counts: torch.Tensor
    total: torch.Tensor | int

    def __init__(
        self,
        settings: ClassSettings,
        name: str,
        *,
        has_matrix: bool = False,
        output_transform: OutputTransform | None = None,
    ) -> None:
        super().__init__(output_transform)
        self.settings = settings
        self.has_matrix = has_matrix and settings.task != "multilabel"
        self._name = name
        num_classes = 2 if settings.task == "binary" else settings.num_classes or 0
        self.add_state("counts", torch.zeros(self._shape(num_classes), dtype=torch.int64))
        self.add_state("total", 0)

    def can_lead(self, other: Metric) -> bool:
        return (
            isinstance(other, ClassCounts)
            and self.settings == other.settings
            and (self.has_matrix or not other.has_matrix)
        )

    def take_in(self, output: object) -> None:
        answers = self.settings.read(output, self._name)
        if not answers.num_classes:
            raise ValueError(
                f"{self._name} got predicted labels, from which the number of classes is not known: pass num_classes=."
            )
        self._allocate(answers.num_classes, answers.target.device)
        self.watch_all(answers)
        num_kept = answers.target.numel() if answers.kept is None else answers.kept.sum()
        if self.settings.task == "multilabel":
            self._count_labels(answers)
            num_kept = num_kept if answers.kept is not None else num_kept // max(answers.num_classes, 1)
        else:
            self._count_classes(answers)
        self.total = self.total + num_kept

    def compute(self) -> torch.Tensor:
        """The counts, (3, C) int64: true positives, predicted and actual members of each class."""
        self.check(self._name)
        return torch.stack([self.true_positives, self.predicted, self.actual])

    def check(self, metric: str) -> None:
        """Check the counts before they are read.

        Raises:
            NotComputableError: no sample was seen. ValueError: a label is outside the classes.
        """
        self.flush()
        if not int(self.total):
            raise NotComputableError("no sample was seen on any rank")
        self.check_labels(self.settings.num_labels or self.counts.shape[-1], metric)

    @property
    def true_positives(self) -> torch.Tensor:
        return self.counts.diagonal() if self.has_matrix else self.counts[0]

    @property
    def predicted(self) -> torch.Tensor:
        return self.counts.sum(0) if self.has_matrix else self.counts[1]

    @property
    def actual(self) -> torch.Tensor:
        return self.counts.sum(1) if self.has_matrix else self.counts[2]

    @property
    def occurs(self) -> torch.Tensor:
        """The classes over which a mean is taken, (C,) bool. In a multilabel task all of them."""
        if self.settings.task == "multilabel":
            return torch.ones_like(self.actual, dtype=torch.bool)
        return self.predicted + self.actual > 0

    @property
    def matrix(self) -> torch.Tensor:
        """The confusion matrix, (C, C) int64, with the targets as rows; (C, 2, 2) for a multilabel task."""
        if self.settings.task != "multilabel":
            return self.counts
        both, predicted, actual, *kept = self.counts
        neither = (kept[0] if kept else int(self.total)) - predicted - actual + both
        return torch.stack([neither, predicted - both, actual - both, both], dim=-1).reshape(-1, 2, 2)

    def _shape(self, num_classes: int) -> tuple[int, int]:
        if self.has_matrix:
            return num_classes, num_classes
        has_kept = self.settings.task == "multilabel" and self.settings.ignore_index is not None
        return (4 if has_kept else 3), num_classes

    def _allocate(self, num_classes: int, device: torch.device) -> None:
        if not self.counts.numel():
            # A tensor made in inference mode could not be added to outside of it.
            with torch.inference_mode(False):
                self.counts = torch.zeros(self._shape(num_classes), dtype=torch.int64, device=device)
        elif self.counts.shape[1] != num_classes:
            raise ValueError(f"{self._name} got {num_classes} classes, but {self.counts.shape[1]} before.")
        elif self.counts.device != device:
            self.counts = self.counts.to(device, non_blocking=True)

    def _count_classes(self, answers: Answers) -> None:
        num_classes = answers.num_classes
        # Clamped, as a scatter outside its tensor would end the CUDA context. `watch` has seen the label.
        target = answers.target.reshape(-1).long().clamp(0, num_classes - 1)
        predicted = answers.predicted.reshape(-1).long()
        if len(answers.given) > 1:
            predicted = predicted.clamp(0, num_classes - 1)
        ones = self.counts.new_ones(()).expand(target.shape)
        if answers.kept is not None:
            ones = answers.kept.reshape(-1).long()
        if self.has_matrix:
            self.counts.view(-1).index_add_(0, target * num_classes + predicted, ones)
            return
        both, predicted_counts, actual_counts = self.counts
        is_right = (predicted == target).long()
        both.index_add_(0, target, is_right if answers.kept is None else is_right * ones)
        predicted_counts.index_add_(0, predicted, ones)
        actual_counts.index_add_(0, target, ones)

    def _count_labels(self, answers: Answers) -> None:
        predicted, target = answers.predicted == 1, answers.target == 1
        samples = [dim for dim in range(target.ndim) if dim != 1]
        parts = [predicted & target, predicted, target]
        if answers.kept is not None:
            parts = [*(part & answers.kept for part in parts), answers.kept]
        self.counts += torch.stack([part.sum(samples) for part in parts])


def check_average(average: object, task: str | None) -> None:
    """Check `average`. Raises: ValueError: it is none of the five, or does not fit the task."""
    if average not in _AVERAGES:
        raise ValueError(f"average={average!r} must be one of {', '.join(map(repr, _AVERAGES))}.")
    if average == "samples" and task != "multilabel":
        raise ValueError(
            f"average='samples' does not go with task={task!r}: a sample has several labels only with "
            "task='multilabel'."
        )


def class_average(
    part: torch.Tensor, whole: torch.Tensor, counts: ClassCounts, average: Average
) -> float | torch.Tensor:
    """The average over classes of `part / whole`, as scikit-learn computes it. 0 / 0 is 0.

    Returns: a float; with average=None (C,) float64, one for each class, 0 for those that do not occur.
    """
    if average == "micro":
        return float(_ratio(part.sum(), whole.sum()))
    ratios = _ratio(part, whole)
    if average is None:
        return ratios
    weights = (counts.occurs if average == "macro" else counts.actual).cpu().double()
    return float(_ratio((ratios * weights).sum(), weights.sum()))


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    part, whole = part.cpu().double(), whole.cpu().double()  # Apple's GPU has no float64
    return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)
