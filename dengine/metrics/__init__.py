"""Metrics that are exact over any number of ranks. All metrics of an engine share one collective."""

from typing import NoReturn

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
from dengine.metrics.collection.compute_all import compute_all
from dengine.metrics.core.function import MetricFunction
from dengine.metrics.core.metric import Metric
from dengine.naming import refuse_name

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

# A name of another library -> what to write instead.
_INSTEAD = {
    "MeanSquaredError": "it is MSE()",
    "MeanAbsoluteError": "it is MAE()",
    "RootMeanSquaredError": "it is RMSE()",
    "TopKCategoricalAccuracy": "it is TopKAccuracy(k)",
    "Fbeta": "it is F1Score() for beta=1; for another, MetricFunction(function, Precision(), Recall())",
    "F1": "it is F1Score()",
    "MetricsLambda": "it is MetricFunction(function, *metrics); arithmetic between metrics gives one, too",
    "MetricCollection": "write engine.add_metrics({name: metric})",
    "VariableAccumulation": "it is Average()",
    "MeanMetric": "it is Average()",
    "Mean": "it is Average()",
    "RunningMean": "it is RunningAverage()",
    "ROC_AUC": "write EpochMetric(lambda predictions, targets: roc_auc_score(targets, predictions))",
    "AUROC": "torchmetrics' goes into add_metric as it is",
    "BinaryAccuracy": 'it is Accuracy("binary")',
    "MulticlassAccuracy": "it is Accuracy(num_classes=...)",
    "Frequency": "it is Throughput()",
}


def __getattr__(name: str) -> NoReturn:
    refuse_name(__name__, name, _INSTEAD)
