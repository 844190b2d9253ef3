"""Update a metric with a step's output, whatever arguments its `update` takes, and count the updates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import Signature, signature

from dengine.metrics.core.batch_size import samples_or_one
from dengine.metrics.core.kinds import AnyMetric, is_mergeable, is_metric, is_tracker
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.metrics.core.transform import is_torchmetrics, prediction_and_target
from dengine.metrics.core.wrapped_methods import counting, counts_updates

__all__ = ["Seen", "check_metric", "default_transform", "takes_pair", "update_of"]


@dataclass
class Seen:
    """The count of updates and samples since the last reset, for a metric that does not count itself."""

    num_updates: int = 0
    num_samples: int = 0

    def counting(self, update: Callable[[object], None]) -> Callable[[object], None]:
        def counted(output: object) -> None:
            update(output)
            self.num_updates += 1
            self.num_samples += samples_or_one(output)

        return counted

    def clear(self) -> None:
        self.num_updates = self.num_samples = 0


def update_of(metric: AnyMetric, transform: OutputTransform | None) -> Callable[[object], None]:
    """`metric.update` as a function of a step's output."""
    if takes_pair(metric):

        def update_spread(output: object) -> None:
            arguments = transform(output) if transform is not None else output
            metric.update(*arguments) if isinstance(arguments, (tuple, list)) else metric.update(arguments)

        return update_spread
    update: Callable[[object], None] = metric.update
    if isinstance(metric, Metric) and not counts_updates(metric):
        update = partial(_update_of_object, metric)
    if transform is None:
        return update
    return lambda output: update(transform(output))


def default_transform(metric: AnyMetric) -> OutputTransform | None:
    """The transform of a step's output that is used if the user gives none."""
    if isinstance(metric, Metric):
        return metric.transform
    return prediction_and_target if takes_pair(metric) else None


def takes_pair(metric: AnyMetric) -> bool:
    """Whether `update` takes prediction and target as two arguments, as in torchmetrics and torcheval."""
    if isinstance(metric, Metric):
        return False
    if is_torchmetrics(metric) or is_mergeable(metric):
        return True
    takes = _signature(metric)
    return takes is not None and not _fits(takes, 1) and _fits(takes, 2)


def check_metric(name: str, metric: AnyMetric) -> None:
    """Check a metric that is to be added. Raises: TypeError: no string as a name, or no metric of one epoch."""
    if not isinstance(name, str):
        raise TypeError(f"A metric's name must be a string, but got {name!r}.")
    if not is_metric(metric):
        raise TypeError(f"Metric {name!r} must be an object with reset, update and compute, but is {metric!r}.")
    if is_tracker(metric):
        raise TypeError(
            f"Metric {name!r} is a MetricTracker, which keeps a copy for each epoch. An engine computes a metric "
            "for each epoch by itself: add the metric that the tracker was made with, and keep the values in a "
            "handler of EPOCH_COMPLETED."
        )
    takes = _signature(metric)
    if takes is None or _fits(takes, 1) or (_fits(takes, 2) and not isinstance(metric, Metric)):
        return
    raise TypeError(
        f"Metric {name!r} ({type(metric).__qualname__}) must have an update(output), which takes a step's output (a "
        f"(prediction, target) pair as one argument), but has update{takes}."
    )


@counting
def _update_of_object(self: Metric, output: object) -> None:
    """Call an `update` that was set on the object instead of the class."""
    self.update(output)


def _signature(metric: AnyMetric) -> Signature | None:
    try:
        return signature(metric.update)
    except (TypeError, ValueError):  # written in C, or a callable without a signature
        return None


def _fits(takes: Signature, num_arguments: int) -> bool:
    try:
        takes.bind(*range(num_arguments))
    except TypeError:
        return False
    return True
