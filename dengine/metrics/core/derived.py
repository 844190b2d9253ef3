"""Metrics without a state of their own, which are computed from another metric that several may share."""

from abc import abstractmethod
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch

from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.types import MetricValue

__all__ = ["DerivedMetric"]


class DerivedMetric(Metric):
    """Base class of metrics that are computed from a stateful metric.

    In an engine, those with equal stateful metrics form a compute group: one stateful metric is updated for all of
    them. A subclass with an `update`, `reset` or `default_transform` of its own is in no group: its stateful metric is
    updated through it.
    """

    def __init__(self, stateful: Metric, output_transform: OutputTransform | None) -> None:
        super().__init__(output_transform)
        self._stateful = stateful
        base, own = DerivedMetric, type(self)
        if (own.update, own.reset, own.default_transform) != (base.update, base.reset, base.default_transform):
            stateful.updated_by = self

    @abstractmethod
    def value_of(self, stateful: Metric) -> MetricValue:
        """The value, given the stateful metric or its reduced copy."""

    def stateful_metrics(self) -> tuple[Metric, ...]:
        return (self._stateful,)

    def read_from(self, stateful: Metric, leader: Metric) -> None:
        if self._stateful is stateful:
            self._stateful = leader

    def reset(self) -> None:
        self._stateful.reset()

    def update(self, output: object) -> None:
        self._stateful.update(output)

    def compute(self) -> MetricValue:
        return self.value_of(self._stateful)

    def num_counted(self) -> torch.Tensor | float | None:
        return self._stateful.num_counted()

    def evaluate(self, reduced: Mapping[int, Any]) -> MetricValue:
        whole = copy(self)
        whole._stateful = reduced[id(self._stateful)]
        return whole.compute()  # which a subclass may have overridden
