"""Metrics: exact over any number of ranks, all of an engine's in one collective."""

from dengine.metrics.accuracy import Accuracy, TopKAccuracy
from dengine.metrics.average import Average
from dengine.metrics.classification import ConfusionMatrix, F1Score, Precision, Recall
from dengine.metrics.distributed import DistributedAccuracy, DistributedMetric
from dengine.metrics.epoch_metric import EpochMetric
from dengine.metrics.function import MetricFunction
from dengine.metrics.loss import Loss
from dengine.metrics.metric import Metric
from dengine.metrics.metric_set import compute_all
from dengine.metrics.perplexity import Perplexity
from dengine.metrics.regression import MAE, MSE, RMSE, R2Score
from dengine.metrics.running import RunningAverage
from dengine.metrics.throughput import Throughput

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
