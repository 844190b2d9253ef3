"""The default transforms of a step's output to the input of a metric's `update`."""

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

__all__ = ["is_torchmetrics", "loss_value", "prediction_and_target"]

_PREDICTION_KEYS = ("pred", "y_pred", "preds", "logits")
_TARGET_KEYS = ("label", "labels", "y", "target", "targets")


def prediction_and_target(output: object) -> object:
    """The `(prediction, target)` pair of a mapping that has both; anything else as it is."""
    if type(output) is dict and "pred" in output and "label" in output:  # a supervised step's: once an iteration
        return output["pred"], output["label"]
    if isinstance(output, Mapping):
        prediction = next((key for key in _PREDICTION_KEYS if key in output), None)
        target = next((key for key in _TARGET_KEYS if key in output), None)
        if prediction is not None and target is not None:
            return output[prediction], output[target]
    return output


def loss_value(output: object) -> object:
    """The `"loss"` of a mapping that has one; anything else as it is."""
    if type(output) is dict and "loss" in output:  # a supervised step's: once an iteration
        return output["loss"]
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return output


def is_torchmetrics(metric: object) -> TypeGuard[Any]:
    """Whether `metric` is from torchmetrics. Does not import that package if it is not imported yet."""
    package = sys.modules.get("torchmetrics")
    return package is not None and isinstance(metric, (package.Metric, package.MetricCollection))
