"""What counts as a metric, whoever wrote it."""

from typing import Any, Protocol, TypeAlias, runtime_checkable

from dengine.metrics.metric import Metric

__all__ = ["AnyMetric", "MetricLike"]


@runtime_checkable
class MetricLike(Protocol):
    """Anything with the three methods of a metric."""

    def reset(self) -> Any: ...

    def update(self, *args: Any, **kwargs: Any) -> Any: ...

    def compute(self) -> Any: ...


AnyMetric: TypeAlias = Metric | MetricLike
