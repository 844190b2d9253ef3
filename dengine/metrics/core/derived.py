"""A metric that holds no state of its own, but reads a leaf that others may read too."""

from abc import abstractmethod
from collections.abc import Mapping
from copy import copy
from typing import Any

from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.types import MetricValue

__all__ = ["View"]


class View(Metric):
    """Base of metrics that are computed from a leaf. An engine lets views of like leaves read one, updated once.

    Where a subclass has an `update`, `reset` or `default_transform` of its own, its leaf is its own too, and is updated
    through it.
    """

    def __init__(self, leaf: Metric, output_transform: OutputTransform | None) -> None:
        super().__init__(output_transform)
        self._leaf = leaf
        own = type(self)
        if (own.update, own.reset, own.default_transform) != (View.update, View.reset, View.default_transform):
            leaf.updated_by = self

    @abstractmethod
    def value_of(self, leaf: Any) -> MetricValue:
        """The value, given the leaf or its reduced copy."""

    def leaves(self) -> tuple[Metric, ...]:
        return (self._leaf,)

    def replace_leaf(self, leaf: Metric, stand_in: Metric) -> None:
        if self._leaf is leaf:
            self._leaf = stand_in

    def reset(self) -> None:
        self._leaf.reset()

    def update(self, output: Any) -> None:
        self._leaf.update(output)

    def compute(self) -> MetricValue:
        return self.value_of(self._leaf)

    def num_counted(self) -> Any:
        return self._leaf.num_counted()

    def evaluate(self, reduced: Mapping[int, Any]) -> MetricValue:
        whole = copy(self)
        whole._leaf = reduced[id(self._leaf)]
        return whole.compute()  # which a subclass may have written anew
