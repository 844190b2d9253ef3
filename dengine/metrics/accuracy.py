"""The share of right answers."""

from typing import Any, Literal

import torch

from dengine.errors import NotComputableError
from dengine.metrics.inputs import as_pair, label_shape_error
from dengine.metrics.metric import Metric, OutputTransform

__all__ = ["Accuracy"]


class Accuracy(Metric):
    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        super().__init__(output_transform)
        self.add_state("correct", 0, reduce="sum")
        self.add_state("total", 0, reduce="sum")

    def update(self, output: Any) -> None:
        prediction, target = as_pair(output, "Accuracy")
        if prediction.ndim == target.ndim + 1:
            prediction = prediction.argmax(1)
        if prediction.shape != target.shape:
            raise label_shape_error("Accuracy", prediction, target)
        self.correct = self.correct + (prediction == target).sum()
        self.total += target.numel()

    def compute(self) -> float:
        if self.total == 0:
            raise NotComputableError("no sample was seen on any rank")
        return float(self.correct / self.total)
