"""Accuracy, and top-k accuracy: the share of right answers."""

from typing import Any

import torch

from dengine.checks import whole_number
from dengine.errors import NotComputableError
from dengine.metrics.builtin.class_counts import Average, ClassCounts, check_average, class_average
from dengine.metrics.builtin.label_metric import LabelMetric
from dengine.metrics.builtin.labels import Answers, ClassSettings, Task, check_scores, foreign_keywords
from dengine.metrics.core.derived import DerivedMetric
from dengine.metrics.core.inputs import as_pair, checked_ignore_index, is_python_number
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.types import MetricValue

__all__ = ["Accuracy", "TopKAccuracy"]


class Accuracy(DerivedMetric):
    """The share of right answers, over the samples of all ranks.

    Shapes: `(N, C, ...)` scores, of which the highest wins, or `(N, ...)` predicted labels, with `(N, ...)` labels.
        With scores, targets of the same shape that add up to 1 are probabilities, and the likeliest class is the label.
        Every position of `...` is a sample. A pair of Python numbers is one sample, right if they are equal.
        task="binary": `(N, ...)` or `(N, 1, ...)` scores, or labels, with `(N, ...)` targets of 0 and 1.
        task="multilabel": `(N, C, ...)` scores, or labels, with targets of the same shape; a sample is right if all
        of its labels are (subset accuracy).
    Cost: no wait for the device; five numbers, or (3, C) counts if `average` is not "micro".
    Source: `sklearn.metrics.accuracy_score`; with `average`, `recall_score`.

    Args:
        task: None finds it from the shapes: scores with one dimension more than the targets are multiclass, labels of
            one shape are compared, and `(N,)` probabilities with whole-number targets are binary. In other cases an
            error asks for it.
        num_classes: None takes it from the scores. Labels outside the classes are an error; if neither scores nor
            `num_classes` give them, labels are only compared.
        threshold: a binary or multilabel score above it means 1; 0.0 is right for logits.
        average: "micro" gives every sample the same weight. The others average the accuracy within each class, which is
            its recall: "macro" is the plain mean over the classes that occur in targets or predictions, "weighted" is
            weighted by their frequency; None gives `(C,)`, 0.0 for a class that does not occur.
        ignore_index: a target that is left out; the other labels of a multilabel sample must be right. It may be a
            class.

    Raises:
        ValueError: `update` got shapes that do not fit, or `compute` finds, on any rank, a label outside the classes,
            targets that are no probabilities, or scores that are nan. NotComputableError: no sample was
            seen.

    Example:
        >>> metric = Accuracy()
        >>> metric.update((torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]), torch.tensor([1, 0, 0, 0])))
        >>> metric.compute()
        0.75
    """

    @foreign_keywords
    def __init__(
        self,
        task: Task | None = None,
        num_classes: int | None = None,
        *,
        threshold: float = 0.5,
        average: Average = "micro",
        ignore_index: int | None = None,
        output_transform: OutputTransform | None = None,
    ) -> None:
        check_average(average, task)
        if task is None and (num_classes is not None or average != "micro"):
            task = "multiclass"
        if task == "multilabel" and average != "micro":
            raise ValueError(f"average={average!r} does not go with task='multilabel': all labels must be right.")
        settings = ClassSettings(task, num_classes, threshold, ignore_index)
        stateful: LabelMetric
        if average == "micro":
            stateful = _PlainAccuracy(settings, output_transform)
        else:
            stateful = ClassCounts(settings, "Accuracy", output_transform=output_transform)
        super().__init__(stateful, output_transform)
        self._average: Average = average

    def value_of(self, stateful: Metric) -> MetricValue:
        if isinstance(stateful, _PlainAccuracy):
            return stateful.compute()
        assert isinstance(stateful, ClassCounts)
        stateful.check("Accuracy")
        return class_average(stateful.true_positives, stateful.actual, stateful, self._average)


class _Share(LabelMetric):
    """Base class of accuracies: the number of right answers divided by the number of all."""

    correct: torch.Tensor | int
    total: torch.Tensor | int
    num_labels: torch.Tensor | int
    name: str

    def __init__(self, output_transform: OutputTransform | None) -> None:
        super().__init__(output_transform)
        self.add_state("correct", 0)
        self.add_state("total", 0)
        # A rank that saw nothing must check the labels of the others, too. 0: the number of classes is unknown.
        self.add_state("num_labels", 0, reduce="gather")

    def num_counted(self) -> int:
        self.flush()
        return int(self.total)

    def compute(self) -> float:
        self.flush()
        total = int(self.total)
        if not total:
            raise NotComputableError("no sample was seen on any rank")
        known = {number for number in torch.as_tensor(self.num_labels).reshape(-1).tolist() if number}
        if len(known) > 1:
            raise ValueError(f"{self.name} got scores of {' and '.join(map(str, sorted(known)))} classes.")
        if known:
            self.check_labels(known.pop(), self.name)
        return int(self.correct) / total

    def count(self, right: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        """Add answers; with `kept`, only those for which it is true."""
        self.correct = self.correct + torch.count_nonzero(right if kept is None else right & kept)
        self.total = self.total + (right.numel() if kept is None else kept.sum())

    def expect(self, num_labels: int) -> None:
        if self.num_labels not in (0, num_labels):
            raise ValueError(f"{self.name} got {num_labels} classes, but {self.num_labels} before.")
        self.num_labels = num_labels


class _PlainAccuracy(_Share):
    name = "Accuracy"
    num_unclear: torch.Tensor | int

    def __init__(self, settings: ClassSettings, output_transform: OutputTransform | None) -> None:
        super().__init__(output_transform)
        self._settings = settings
        if settings.task is None:
            self.add_state("num_unclear", 0)

    def take_in(self, output: Any) -> None:
        settings = self._settings
        if settings.task is None and _is_number_pair(output):
            if output[1] != settings.ignore_index:
                self.correct = self.correct + int(output[0] == output[1])
                self.total = self.total + 1
            return
        answers = settings.read(output, self.name)
        if answers.given and answers.num_classes:
            self.expect(2 if settings.task == "multilabel" else answers.num_classes)
            self.watch_all(answers)
        if answers.is_unclear is not None:
            self.num_unclear = self.num_unclear + answers.is_unclear.sum()
        predicted, target, kept = answers.predicted, answers.target, answers.kept
        if answers.scores is not None and predicted.dtype == torch.bool:
            target = target.bool()  # of 0 and 1, which is checked; to compare two dtypes takes several times as long
        right = predicted == target
        if settings.task == "multilabel":
            right = right.all(1) if kept is None else (right | ~kept).all(1)
            kept = None if kept is None else kept.any(1)  # a sample without a label that counts is left out
        self.count(right, kept)

    def compute(self) -> float:
        self.flush()
        if self._settings.task is None and int(self.num_unclear):
            raise ValueError(
                f"{self.name} got {int(self.num_unclear)} predictions or targets that are neither labels nor, if the "
                "targets are whole numbers, probabilities: pass task='binary' or 'multilabel', with threshold=0.0 for "
                "logits."
            )
        return super().compute()


class TopKAccuracy(_Share):
    """The share of samples whose label is among the `k` classes of the highest scores, over all ranks.

    Shapes: `(N, C, ...)` scores with `(N, ...)` labels, or with class probabilities as `Accuracy` takes them. With
        `k >= C` every answer is right. Labels of `ignore_index` are left out.
    Cost: no wait for the device; five numbers.
    Source: `sklearn.metrics.top_k_accuracy_score`. `torch.topk` decides which of equal scores is higher.

    Raises:
        ValueError: `k` below 1, shapes that do not go together, or, in `compute`, a label outside the classes, targets
            that are no probabilities, or scores that are nan.
        NotComputableError: no sample was seen.

    Example:
        >>> metric = TopKAccuracy(k=2)
        >>> metric.update((torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.3, 0.2]]), torch.tensor([1, 2])))
        >>> metric.compute()
        0.5
    """

    name = "TopKAccuracy"

    def __init__(
        self, k: int = 5, *, ignore_index: int | None = None, output_transform: OutputTransform | None = None
    ) -> None:
        super().__init__(output_transform)
        self._k = whole_number("k", k, least=1)
        self._ignore_index = checked_ignore_index(ignore_index)

    def take_in(self, output: object) -> None:
        scores, target = as_pair(output, self.name)
        labels, num_classes = check_scores(scores, target, self.name, self._ignore_index)
        self.expect(num_classes)
        highest, classes = scores.topk(min(self._k, num_classes), dim=1, sorted=False)
        answers = Answers(classes, labels, num_classes, (labels,), highest)
        if self._ignore_index is not None:
            answers = answers._replace(scores=highest.amax(1)).without(self._ignore_index)
        self.watch_all(answers)
        self.count((classes == answers.target.unsqueeze(1)).any(1), answers.kept)


def _is_number_pair(output: object) -> bool:
    return (
        isinstance(output, (tuple, list))
        and len(output) == 2
        and is_python_number(output[0])
        and is_python_number(output[1])
    )
