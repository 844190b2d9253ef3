"""From scores and labels to classes, and a watch over labels that never waits for the device.

Shapes: N samples, C classes or labels, ... any further dimensions, whose positions count as samples.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from dengine.checks import whole_number
from dengine.metrics.batch_queue import BatchQueue
from dengine.metrics.inputs import as_pair, shape_error
from dengine.metrics.metric import Metric, OutputTransform

__all__ = ["Answers", "ClassSettings", "LabelMetric", "Task", "check_scores"]

Task: TypeAlias = Literal["binary", "multiclass", "multilabel"]
_TASKS = ("binary", "multiclass", "multilabel")
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_NOT_WHOLE = torch.iinfo(torch.int64).min  # what a target of 0.3 is as a label


class Answers(NamedTuple):
    """One batch, read: what was predicted and what is right, as labels of one shape."""

    predicted: torch.Tensor
    target: torch.Tensor
    num_classes: int  # 0: nobody knows
    given: tuple[torch.Tensor, ...]  # labels that came from outside, so that they may lie outside the classes
    num_unclear: torch.Tensor | None = None  # predictions that look like scores where labels were understood


@dataclass(frozen=True)
class ClassSettings:
    """How a metric reads scores and labels. Metrics of equal settings can be computed from one count.

    Raises:
        ValueError: an unknown task, a num_classes or a threshold that does not go with it. TypeError: no number.
    """

    task: Task | None
    num_classes: int | None
    threshold: float

    def __post_init__(self) -> None:
        if callable(self.task):
            raise TypeError(f"task={self.task!r} is a function: a transform is passed by name, as output_transform=.")
        if self.task is not None and self.task not in _TASKS:
            raise ValueError(f"task={self.task!r} must be one of {', '.join(map(repr, _TASKS))}.")
        if self.num_classes is not None:
            whole_number("num_classes", self.num_classes, least=1)
        if self.task == "binary" and self.num_classes not in (None, 2):
            raise ValueError(f"num_classes={self.num_classes} does not go with task='binary', which has 2.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"threshold={self.threshold!r} must be a number.")
        if self.task == "multiclass" and self.threshold != 0.5:
            raise ValueError(f"threshold={self.threshold} has no use with task='multiclass', which takes the highest.")

    @property
    def num_labels(self) -> int | None:
        """How many labels a target may have: of a multilabel task each is 0 or 1."""
        return self.num_classes if self.task in (None, "multiclass") else 2

    def read(self, output: Any, metric: str) -> Answers:
        """The classes in a `(prediction, target)` pair. No wait for the device.

        Raises:
            TypeError: no pair, or targets of a dtype that labels do not have. ValueError: shapes that do not go
            together, or a number of classes other than `num_classes`.
        """
        prediction, target = as_pair(output, metric)
        if self.task == "binary":
            return self._binary(prediction, target, metric)
        if self.task == "multilabel":
            return self._multilabel(prediction, target, metric)
        if prediction.ndim == target.ndim + 1:
            labels, num_classes = check_scores(prediction, target, metric)
            self._check_classes(num_classes, prediction, target, metric)
            return Answers(prediction.argmax(1), labels, num_classes, (labels,))
        if self.task is None and prediction.shape == target.shape:
            return self._same_shape(prediction, target, metric)
        return self._labels(prediction, target, metric)

    def _labels(self, prediction: torch.Tensor, target: torch.Tensor, metric: str) -> Answers:
        if prediction.shape != target.shape or prediction.is_floating_point():
            raise shape_error(
                metric,
                prediction,
                target,
                "(N, C, ...) scores, or (N, ...) predicted labels of a whole-number dtype, with (N, ...) labels; for "
                "scores of the targets' own shape pass task='binary' or 'multilabel'",
            )
        labels = _index(prediction, metric), _index(target, metric)
        return Answers(*labels, self.num_classes or 0, labels)

    def _binary(self, prediction: torch.Tensor, target: torch.Tensor, metric: str) -> Answers:
        if prediction.ndim == target.ndim + 1 and prediction.shape[1] == 1:
            prediction = prediction.squeeze(1)
        if prediction.shape != target.shape:
            raise shape_error(metric, prediction, target, "(N, ...) or (N, 1, ...) scores with (N, ...) targets")
        return self._two_classes(prediction, target, num_classes=2)

    def _multilabel(self, prediction: torch.Tensor, target: torch.Tensor, metric: str) -> Answers:
        if prediction.shape != target.shape or target.ndim < 2:
            raise shape_error(metric, prediction, target, "(N, C, ...) scores with (N, C, ...) targets of 0 and 1")
        self._check_classes(target.shape[1], prediction, target, metric)
        return self._two_classes(prediction, target, num_classes=target.shape[1])

    def _two_classes(self, prediction: torch.Tensor, target: torch.Tensor, num_classes: int) -> Answers:
        labels = _zero_or_one(target)
        if prediction.is_floating_point():
            return Answers(prediction > self.threshold, labels, num_classes, (labels,))
        predicted = _zero_or_one(prediction)
        return Answers(predicted, labels, num_classes, (predicted, labels))

    def _check_classes(self, num_classes: int, prediction: torch.Tensor, target: torch.Tensor, metric: str) -> None:
        if self.num_classes not in (None, num_classes):
            raise ValueError(
                f"{metric} has num_classes={self.num_classes}, but got predictions of shape {tuple(prediction.shape)} "
                f"and targets of shape {tuple(target.shape)}: dimension 1 has {num_classes}."
            )

    def _same_shape(self, prediction: torch.Tensor, target: torch.Tensor, metric: str) -> Answers:
        """Where the user names no task: labels that are equal or not or, for one score a sample, two classes."""
        if not prediction.is_floating_point():
            return Answers(prediction, target, 0, ())
        if target.is_floating_point():
            is_score = ((prediction - prediction.round()).abs() > 0) & (target == target.round())
            return Answers(prediction, target, 0, (), (is_score & (prediction != target)).sum())
        if prediction[:1].numel() > 1:
            raise shape_error(
                metric, prediction, target, "such a pair where it is told which: pass task='binary' or 'multilabel'"
            )
        unclear = ((prediction < 0) | (prediction > 1)).sum()
        return self._two_classes(prediction, target, num_classes=2)._replace(num_unclear=unclear)


class LabelMetric(Metric):
    """Base of metrics that count samples one by one, small batches together (`BatchQueue`).

    They keep the lowest and the highest label on the device, to be judged in `compute`. The two ride in the all-reduce
    of the counts, so that a label outside the classes is an error on every rank.
    """

    adds_to_no_graph = True

    lowest: torch.Tensor | int
    highest: torch.Tensor | int

    def __init__(self, output_transform: OutputTransform | None) -> None:
        super().__init__(output_transform)
        # 0 is in every range, so a rank that saw nothing has no say.
        self.add_state("lowest", 0, reduce="gather")
        self.add_state("highest", 0, reduce="gather")
        self._queue = BatchQueue()

    @abstractmethod
    def take_in(self, output: Any) -> None:
        """Check and count a batch. Must not wait for the device."""

    def update(self, output: Any) -> None:
        if self._queue.add(output):
            if self._queue.is_full:
                self.settle()
            return
        self.settle()
        with torch.no_grad():
            self.take_in(output)
        self._queue.expect(output)

    def settle(self) -> None:
        if (waiting := self._queue.take()) is not None:
            self.take_in(waiting)

    def reset(self) -> None:
        super().reset()
        self._queue.clear()

    def with_states(self, values: Mapping[str, Any]) -> Metric:
        other = super().with_states(values)
        assert isinstance(other, LabelMetric)
        other._queue = BatchQueue()
        return other

    def watch(self, labels: torch.Tensor) -> None:
        """Remember how low and high `labels` reach. No wait for the device."""
        if labels.dtype == torch.bool or not labels.numel():
            return
        low, high = labels.aminmax()
        if isinstance(self.lowest, torch.Tensor) and isinstance(self.highest, torch.Tensor):
            self.lowest = torch.minimum(self.lowest, low)
            self.highest = torch.maximum(self.highest, high)
        else:
            self.lowest, self.highest = low.long().clamp(max=0), high.long().clamp(min=0)

    def check_labels(self, num_labels: int, metric: str) -> None:
        """Judge the labels watched, all batches being counted. Waits for the device, unless the states are reduced.

        Raises:
            ValueError: a label outside 0 ... num_labels - 1; it says how far they reach.
        """
        lowest, highest = int(torch.as_tensor(self.lowest).min()), int(torch.as_tensor(self.highest).max())
        if lowest == _NOT_WHOLE:
            raise ValueError(f"{metric} got labels that are no whole numbers; it takes 0 to {num_labels - 1}.")
        if lowest < 0 or highest >= num_labels:
            reach = [f"as low as {lowest}"] * (lowest < 0) + [f"as high as {highest}"] * (highest >= num_labels)
            raise ValueError(
                f"{metric} got labels {' and '.join(reach)}, but {num_labels} classes have the labels 0 to "
                f"{num_labels - 1}: correct the labels, or num_classes or task."
            )


def check_scores(scores: torch.Tensor, target: torch.Tensor, metric: str) -> tuple[torch.Tensor, int]:
    """The labels in `target`, and the number of classes that `(N, C, ...)` scores are for.

    Raises:
        ValueError: shapes that do not go together. TypeError: targets of a dtype that labels do not have.
    """
    if (
        scores.ndim != target.ndim + 1
        or scores.shape[0] != target.shape[0]
        or scores.shape[2:] != target.shape[1:]
        or not scores.shape[1]
    ):
        raise shape_error(metric, scores, target, "(N, C, ...) scores with (N, ...) labels")
    return _index(target, metric), scores.shape[1]


def _index(labels: torch.Tensor, metric: str) -> torch.Tensor:
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{metric} takes labels of a whole-number dtype, but got {labels.dtype}.")
    return labels if labels.dtype in _INDEX_DTYPES else labels.long()


def _zero_or_one(labels: torch.Tensor) -> torch.Tensor:
    """Labels of two classes; floats are taken, as `binary_cross_entropy` needs them so."""
    if not labels.is_floating_point():
        return labels if labels.dtype in _INDEX_DTYPES else labels.long()
    return torch.where(labels == labels.round(), labels, _NOT_WHOLE).long()
