"""Find the predicted and the actual class in scores and labels.

Shapes: N samples, C classes or labels, ... any further dimensions, whose positions count as samples.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

from dengine.checks import number, whole_number
from dengine.metrics.core.inputs import as_pair, checked_ignore_index, is_kept, shape_error
from dengine.naming import other_keywords

__all__ = [
    "NAN_SCORE",
    "NOT_WHOLE",
    "NO_PROBABILITIES",
    "Answers",
    "ClassSettings",
    "Task",
    "check_scores",
    "foreign_keywords",
]

# Arguments that metrics of other libraries have.
foreign_keywords = other_keywords(
    is_multilabel='write task="multilabel"',
    device="states are kept on the device of the data",
    labels="pass num_classes=, and average=None for a value of each class",
)

Task: TypeAlias = Literal["binary", "multiclass", "multilabel"]
_TASKS = ("binary", "multiclass", "multilabel")
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# Marks instead of labels. The lowest of them tells `compute` what was wrong.
NOT_WHOLE = torch.iinfo(torch.int64).min  # a target of 0.3
NO_PROBABILITIES = NOT_WHOLE + 1  # class probabilities that do not add up to 1
NAN_SCORE = NOT_WHOLE + 2  # a score that decides, and is not a number


class Answers(NamedTuple):
    """The predictions and targets of one batch, as labels of one shape."""

    predicted: torch.Tensor
    target: torch.Tensor
    num_classes: int  # 0: unknown
    given: tuple[torch.Tensor, ...]  # labels that the user gave, which may be outside the classes
    scores: torch.Tensor | None = None  # the scores that decided the prediction
    is_unclear: torch.Tensor | None = None  # true for a score that was taken for a label
    kept: torch.Tensor | None = None  # which targets count; None: all

    def without(self, ignore_index: int) -> "Answers":
        """The same answers, in which targets of `ignore_index` do not count."""
        kept = is_kept(self.target, ignore_index)
        given = tuple(labels.masked_fill(~kept, 0) for labels in self.given)
        scores = None if self.scores is None else self.scores.masked_fill(~kept, 0)
        is_unclear = None if self.is_unclear is None else self.is_unclear & kept
        target = self.target.masked_fill(~kept, 0)
        return self._replace(target=target, given=given, scores=scores, is_unclear=is_unclear, kept=kept)


@dataclass(frozen=True)
class ClassSettings:
    """The way in which a metric reads scores and labels. Metrics with equal settings can share one count.

    Raises:
        ValueError: an unknown task, or a num_classes or threshold that does not fit it. TypeError: not a number.
    """

    task: Task | None
    num_classes: int | None
    threshold: float
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if callable(self.task):
            raise TypeError(f"task={self.task!r} is a function: a transform is passed by name, as output_transform=.")
        if self.task is not None and self.task not in _TASKS:
            raise ValueError(f"task={self.task!r} must be one of {', '.join(map(repr, _TASKS))}.")
        if self.num_classes is not None:
            whole_number("num_classes", self.num_classes, least=1)
        if self.task == "binary" and self.num_classes not in (None, 2):
            raise ValueError(f"num_classes={self.num_classes} does not go with task='binary', which has 2.")
        number("threshold", self.threshold)
        if self.task == "multiclass" and self.threshold != 0.5:
            raise ValueError(f"threshold={self.threshold} has no use with task='multiclass', which takes the highest.")
        checked_ignore_index(self.ignore_index)

    @property
    def num_labels(self) -> int | None:
        """The number of values that a target may have: in a multilabel task 2, as each is 0 or 1."""
        return self.num_classes if self.task in (None, "multiclass") else 2

    def read(self, output: object, metric: str) -> Answers:
        """The classes in a `(prediction, target)` pair. No wait for the device.

        Raises:
            TypeError: it is no pair, or the targets have a dtype that labels cannot have. ValueError: the shapes do not
                fit, or the number of classes is not `num_classes`.
        """
        prediction, target = as_pair(output, metric)
        answers = self._answers(prediction, target, metric)
        return answers if self.ignore_index is None else answers.without(self.ignore_index)

    def _answers(self, prediction: torch.Tensor, target: torch.Tensor, metric: str) -> Answers:
        if self.task == "binary":
            return self._binary(prediction, target, metric)
        if self.task == "multilabel":
            return self._multilabel(prediction, target, metric)
        if prediction.ndim == target.ndim + 1 or are_probabilities(prediction, target):
            labels, num_classes = check_scores(prediction, target, metric, self.ignore_index)
            self._check_classes(num_classes, prediction, target, metric)
            highest, predicted = prediction.max(1)  # quicker than argmax, and of a row with nan it is nan
            return Answers(predicted, labels, num_classes, (labels,), highest)
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
            return Answers(prediction > self.threshold, labels, num_classes, (labels,), prediction)
        predicted = _zero_or_one(prediction)
        return Answers(predicted, labels, num_classes, (predicted, labels))

    def _check_classes(self, num_classes: int, prediction: torch.Tensor, target: torch.Tensor, metric: str) -> None:
        if self.num_classes not in (None, num_classes):
            raise ValueError(
                f"{metric} has num_classes={self.num_classes}, but got predictions of shape {tuple(prediction.shape)} "
                f"and targets of shape {tuple(target.shape)}: dimension 1 has {num_classes}."
            )

    def _same_shape(self, prediction: torch.Tensor, target: torch.Tensor, metric: str) -> Answers:
        """Answers without a task given: labels to be compared or, with one score a sample, two classes."""
        if target.is_floating_point():
            is_label = _is_whole(target) & _is_whole(prediction)
            return Answers(prediction, target, 0, (), is_unclear=~is_label & (prediction != target))
        if not prediction.is_floating_point():
            return Answers(prediction, target, 0, ())
        if prediction[:1].numel() > 1:
            raise shape_error(
                metric, prediction, target, "such a pair only if the task is given: pass task='binary' or 'multilabel'"
            )
        is_unclear = ~((prediction >= 0) & (prediction <= 1))
        return self._two_classes(prediction, target, num_classes=2)._replace(is_unclear=is_unclear)


def are_probabilities(scores: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether `target` holds a probability of each class, as in `cross_entropy`, rather than labels."""
    return (
        target.is_floating_point()
        and scores.is_floating_point()
        and scores.shape == target.shape
        and target.ndim > 1
        and target.shape[1] > 1
    )


def check_scores(
    scores: torch.Tensor, target: torch.Tensor, metric: str, ignore_index: int | None = None
) -> tuple[torch.Tensor, int]:
    """The labels in `target`, and the number of classes in `(N, C, ...)` scores.

    Targets with the shape of the scores are class probabilities: the label is their likeliest class.

    Raises:
        ValueError: the shapes do not fit, or there is an `ignore_index`, but the targets are probabilities.
        TypeError: the targets have a dtype that labels cannot have.
    """
    if are_probabilities(scores, target):
        if ignore_index is not None:
            raise ValueError(
                f"{metric} with ignore_index={ignore_index} got targets of shape {tuple(target.shape)} that are class "
                "probabilities; only labels of a whole-number dtype can be left out."
            )
        return _likeliest(scores, target), scores.shape[1]
    if (
        scores.ndim != target.ndim + 1
        or scores.shape[0] != target.shape[0]
        or scores.shape[2:] != target.shape[1:]
        or not scores.shape[1]
    ):
        raise shape_error(metric, scores, target, "(N, C, ...) scores with (N, ...) labels")
    return _index(target, metric), scores.shape[1]


def _likeliest(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The label of the highest of `(N, C, ...)` probabilities; a mark that is an error later if they are none."""
    wide = target.float() if target.dtype.itemsize < 4 else target
    # With a tolerance for floats of 16 bits. The difference is nan if a target is.
    is_distribution = ((wide.sum(1) - 1).abs() <= 0.02) & (wide.amin(1) >= 0)
    # A prediction that equals its target to the last bit is right, whatever it is.
    return torch.where(is_distribution | (scores == target).all(1), wide.argmax(1), NO_PROBABILITIES)


def _is_whole(value: torch.Tensor) -> torch.Tensor:
    return value - value.round() == 0 if value.is_floating_point() else torch.ones_like(value, dtype=torch.bool)


def _index(labels: torch.Tensor, metric: str) -> torch.Tensor:
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{metric} takes labels of a whole-number dtype, but got {labels.dtype}.")
    return labels if labels.dtype in _INDEX_DTYPES else labels.long()


def _zero_or_one(labels: torch.Tensor) -> torch.Tensor:
    """Labels of two classes as integers. Floats are allowed, as `binary_cross_entropy` needs them."""
    if not labels.is_floating_point():
        return labels if labels.dtype in _INDEX_DTYPES else labels.long()
    return torch.where(labels == labels.round(), labels, NOT_WHOLE).long()
