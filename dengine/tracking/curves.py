"""Make curves from the rows of a run, and find the best point of a curve. Pure: draws nothing."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Best", "Curve", "best_of", "curves_of", "smoothed"]

_SPLITS = {"train": "training", "training": "training", "trn": "training"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "eval", "dev"), "validation") | {"test": "test"}
_PREFIX = re.compile(rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})[/_.](.+)")
_HIGHER = re.compile(r"acc|f1|auc|precision|recall|r2|iou|dice|bleu|map$|score|top", re.IGNORECASE)
_LOWER = re.compile(r"loss|error|mse|mae|ppl|perplexity|nll", re.IGNORECASE)
_OVER = ("step", "time", "epoch", "global_step")


@dataclass(frozen=True)
class Curve:
    """A curve: the metric `name` of `split` ("training", "validation", "test", "" if unknown) over "epoch" or "step".

    Shapes: x (N,) ascending; y (N,), not finite if the value in the row is not.
    """

    name: str
    split: str
    x: np.ndarray
    y: np.ndarray
    over: str


@dataclass(frozen=True)
class Best:
    name: str
    x: float
    y: float
    over: str


def curves_of(rows: Sequence[Mapping[str, object]]) -> list[Curve]:
    """The curves in order of their first appearance.

    If a run was resumed, a step may occur twice: the later row counts. If some rows have an epoch as their step and
    others an iteration, both are drawn over iterations: rows of an epoch at the last iteration that was logged before.
    """
    counts_epochs = any("epoch" in row for row in rows) and all(
        abs(_number(row["step"]) - _number(row["epoch"])) <= 1 for row in rows if "epoch" in row and "step" in row
    )
    is_mixed = counts_epochs and any("epoch" not in row for row in rows)
    reached = _iteration_at(rows) if is_mixed else None
    points: dict[str, dict[float, float]] = {}
    over = "epoch" if rows and all("epoch" in row for row in rows) else "step"
    for index, row in enumerate(rows):
        x = _number(row.get(over, index))
        if reached is not None and "epoch" in row:
            x = reached(_number(row.get("time", math.nan)), x)
        for name, value in row.items():
            if name not in _OVER and value is not None and not isinstance(value, bool) and not math.isnan(x):
                if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
                    continue
                points.setdefault(name, {})[x] = _number(value)
    return [_curve(name, found, over) for name, found in points.items()]


def best_of(curves: Sequence[Curve]) -> Best | None:
    """The best point of a validation accuracy or a similar score, else of a validation loss; None without one."""
    unseen = [curve for curve in curves if curve.split in ("validation", "test")]
    for pattern, pick in ((_HIGHER, np.nanargmax), (_LOWER, np.nanargmin)):
        for curve in unseen:
            finite = np.where(np.isfinite(curve.y), curve.y, np.nan)
            if pattern.search(curve.name) and not np.isnan(finite).all():
                index = int(pick(finite))
                return Best(curve.name, float(curve.x[index]), float(curve.y[index]), curve.over)
    return None


def smoothed(y: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each point and its `reach` neighbours on either side (fewer at the ends), so that nothing is delayed.

    Values that are not finite are left out of a mean; it is NaN if there are no others.
    """
    is_finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    index = np.arange(len(y))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums[high] - sums[low]) / (counts[high] - counts[low]))


def _curve(name: str, points: Mapping[float, float], over: str) -> Curve:
    x = np.array(sorted(points))
    y = np.array([points[at] for at in sorted(points)])
    matched = _PREFIX.fullmatch(name)
    if matched is None:
        return Curve(name, "", x, y, over)
    return Curve(matched[2], _SPLITS[matched[1]], x, y, over)


def _iteration_at(rows: Sequence[Mapping[str, object]]) -> Callable[[float, float], float]:
    """`(time, otherwise) -> iteration`, from the rows of iterations; `otherwise` if no row has both."""
    known = [
        (_number(row["time"]), _number(row["step"]))
        for row in rows
        if "epoch" not in row and "time" in row and "step" in row
    ]
    if not known:
        return lambda time_s, otherwise: otherwise
    times, steps = map(np.array, zip(*sorted(known), strict=True))

    def reached(time_s: float, otherwise: float) -> float:
        # The last one that was logged: an epoch is logged when it ends.
        index = int(np.searchsorted(times, time_s, side="right")) - 1
        return otherwise if math.isnan(time_s) else float(steps[max(index, 0)])

    return reached


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number above any float
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return math.nan
