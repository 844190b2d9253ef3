"""What a metric has gathered so far, as plain data: an epoch that is resumed in its middle counts all of it."""

from typing import Any

import torch

from dengine.metrics.leaf import MetricLike
from dengine.metrics.metric import Metric

__all__ = ["give_back", "held"]


def held(metric: Any) -> dict[str, Any]:
    """What the attributes of `metric`, and of metrics inside it, hold: numbers, strings, tensors (copied to the CPU),
    and lists and dicts of them. Anything else is what the metric was built with, and stays.
    """
    if isinstance(metric, Metric):
        metric.settle()
    return {
        name: {"metric": held(value)} if _is_inner(value) else {"value": _copied(value)}
        for name, value in _attributes(metric).items()
        if _is_inner(value) or _is_plain(value)
    }


def give_back(metric: Any, state: dict[str, Any]) -> None:
    """Set the attributes of `metric` to what `held` gave, tensors on the devices where they are now."""
    if isinstance(metric, Metric):
        metric.settle()  # what waits there belongs to what is replaced
    now = _attributes(metric)
    for name, entry in state.items():
        if "metric" in entry:
            if name in now:
                give_back(now[name], entry["metric"])
        else:
            _set(metric, name, _placed(entry["value"], now.get(name)))


def _attributes(metric: Any) -> dict[str, Any]:
    """Also of a `torch.nn.Module` (torchmetrics), which keeps those inside it apart."""
    return {**vars(metric), **vars(metric).get("_modules", {})}


def _set(metric: Any, name: str, value: Any) -> None:
    # Past __setattr__, by which torchmetrics guards its own.
    vars(metric)[name] = value


def _is_inner(value: Any) -> bool:
    return isinstance(value, MetricLike) and not isinstance(value, type)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(isinstance(key, str | int) and _is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return {key: _copied(each) for key, each in value.items()} if isinstance(value, dict) else value


def _placed(value: Any, like: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(like.device, copy=True) if isinstance(like, torch.Tensor) else value.clone()
    if isinstance(value, list):
        return [_placed(each, None) for each in value]
    return {key: _placed(each, None) for key, each in value.items()} if isinstance(value, dict) else value
