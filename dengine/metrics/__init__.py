"""Metrics: exact over any number of ranks, all of an engine's in one collective."""

from dengine.metrics.builtin.accuracy import Accuracy, TopKAccuracy
from dengine.metrics.builtin.average import Average
from dengine.metrics.builtin.classification import ConfusionMatrix, F1Score, Precision, Recall
from dengine.metrics.builtin.distributed import DistributedAccuracy, DistributedMetric
from dengine.metrics.builtin.epoch_metric import EpochMetric
from dengine.metrics.builtin.loss import Loss
from dengine.metrics.builtin.perplexity import Perplexity
from dengine.metrics.builtin.regression import MAE, MSE, RMSE, R2Score
from dengine.metrics.builtin.running import RunningAverage
from dengine.metrics.builtin.throughput import Throughput
from dengine.metrics.collection.metric_set import compute_all
from dengine.metrics.core.function import MetricFunction
from dengine.metrics.core.metric import Metric

__all__ = [
    "MAE",
    "MSE",
    "RMSE",
    "Accuracy",
    "Average",
    "ConfusionMatrix",
    "DistributedAccuracy",
    "DistributedMetric",
    "EpochMetric",
    "F1Score",
    "Loss",
    "Metric",
    "MetricFunction",
    "Perplexity",
    "Precision",
    "R2Score",
    "Recall",
    "RunningAverage",
    "Throughput",
    "TopKAccuracy",
    "compute_all",
]
