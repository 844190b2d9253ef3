"""Metrics: exact over any number of ranks, all of an engine's in one collective."""

from dengine.metrics.accuracy import Accuracy
from dengine.metrics.distributed import DistributedAccuracy, DistributedMetric
from dengine.metrics.metric import Metric
from dengine.metrics.metric_set import compute_all

__all__ = ["Accuracy", "DistributedAccuracy", "DistributedMetric", "Metric", "compute_all"]
