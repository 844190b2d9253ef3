"""The base class of metrics that count samples. It checks labels and scores without a wait for the device."""

from abc import abstractmethod
from collections.abc import Mapping

import torch

from dengine.metrics.builtin.labels import NAN_SCORE, NO_PROBABILITIES, NOT_WHOLE, Answers
from dengine.metrics.core.batch_queue import BatchQueue
from dengine.metrics.core.metric import Metric, OutputTransform

__all__ = ["LabelMetric"]


class LabelMetric(Metric):
    """Base class of metrics that count samples, small batches together (`BatchQueue`).

    They keep the lowest and the highest label on the device, which `compute` checks. Both are part of the all-reduce of
    the counts, so that a label outside the classes, or a score that is nan, is an error on every rank.
    """

    adds_to_no_graph = True

    lowest: torch.Tensor | int
    highest: torch.Tensor | int

    def __init__(self, output_transform: OutputTransform | None) -> None:
        super().__init__(output_transform)
        # 0 is in every range, so a rank that saw nothing changes nothing.
        self.add_state("lowest", 0, reduce="gather")
        self.add_state("highest", 0, reduce="gather")
        self._queue = BatchQueue()
        self._highest_score: torch.Tensor | None = None  # since the states were last read

    @abstractmethod
    def take_in(self, output: object) -> None:
        """Check and count a batch. Must not wait for the device."""

    def update(self, output: object) -> None:
        if self._queue.add(output):
            if self._queue.is_full:
                self._take_in_waiting()
            return
        self._take_in_waiting()
        with torch.no_grad():
            self.take_in(output)
        self._queue.expect(output)

    def flush(self) -> None:
        self._take_in_waiting()
        if (highest := self._highest_score) is not None:
            mark = torch.where(highest.isnan(), NAN_SCORE, 0)
            self.lowest = torch.minimum(self.lowest, mark) if isinstance(self.lowest, torch.Tensor) else mark
            self._highest_score = None

    def _take_in_waiting(self) -> None:
        if (waiting := self._queue.take()) is not None:
            self.take_in(waiting)

    def reset(self) -> None:
        super().reset()
        self._queue.clear()
        self._highest_score = None

    def with_states(self, values: Mapping[str, object]) -> Metric:
        other = super().with_states(values)
        assert isinstance(other, LabelMetric)
        other._queue = BatchQueue()
        return other

    def watch_all(self, answers: Answers) -> None:
        """Note what `compute` must check of `answers`. No wait for the device."""
        for labels in answers.given:
            self.watch(labels)
        if answers.scores is not None:
            self.watch_scores(answers.scores)

    def watch_scores(self, scores: torch.Tensor) -> None:
        """Note whether a deciding score is nan. No wait for the device."""
        if not scores.is_floating_point() or not scores.numel():
            return
        highest = scores.amax()  # nan if there is one
        self._highest_score = highest if self._highest_score is None else torch.maximum(self._highest_score, highest)

    def watch(self, labels: torch.Tensor) -> None:
        """Note the lowest and the highest of `labels`. No wait for the device."""
        if labels.dtype == torch.bool or not labels.numel():
            return
        low, high = labels.aminmax()
        if isinstance(self.lowest, torch.Tensor):
            self.lowest = torch.minimum(self.lowest, low)
        else:
            self.lowest = low.long().clamp(max=0)
        if isinstance(self.highest, torch.Tensor):
            self.highest = torch.maximum(self.highest, high)
        else:
            self.highest = high.long().clamp(min=0)

    def check_labels(self, num_labels: int, metric: str) -> None:
        """Check the labels of all batches. Waits for the device, unless the states are reduced.

        Raises:
            ValueError: a label is outside 0 ... num_labels - 1 (the message has the extremes), or a score is nan.
        """
        lowest, highest = int(torch.as_tensor(self.lowest).min()), int(torch.as_tensor(self.highest).max())
        if lowest in _WHAT_IS_WRONG:
            raise ValueError(f"{metric} got {_WHAT_IS_WRONG[lowest].format(highest=num_labels - 1)}")
        if lowest < 0 or highest >= num_labels:
            reach = [f"as low as {lowest}"] * (lowest < 0) + [f"as high as {highest}"] * (highest >= num_labels)
            raise ValueError(
                f"{metric} got labels {' and '.join(reach)}, but {num_labels} classes have the labels 0 to "
                f"{num_labels - 1}: correct the labels, or num_classes or task."
            )


_WHAT_IS_WRONG = {
    NOT_WHOLE: (
        "labels that are no whole numbers; it takes 0 to {highest}. If they are probabilities, pass the likelier "
        "answer, (target > 0.5).long(), by output_transform=."
    ),
    NO_PROBABILITIES: (
        "targets of the shape of the scores that are no probabilities of classes, as they do not add up to 1: pass "
        "task='binary' or 'multilabel', or labels of a whole-number dtype."
    ),
    NAN_SCORE: "scores that are nan, so that no class has the highest: look for what makes the model's output nan.",
}
