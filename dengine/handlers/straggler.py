"""Which rank the others wait for, from the time that each needs for a step. Pure."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TypeAlias

from dengine.handlers.phase_clock import PHASES, SUMS
from dengine.types import Straggler

__all__ = ["find_straggler"]

# A straggler takes longer than the others by this share of its step, and by so many standard errors: in even ranks,
# one that is only unlucky is further off once in 10^6 epochs. Steps are not independent, hence so many.
_MIN_SHARE = 0.05
_MIN_ERRORS = 6.0
_MIN_STEPS = 3
_AROUND = ("data", "handlers")

StepTimes: TypeAlias = "Mapping[str, float]"  # one rank's SUMS


def find_straggler(sums: Sequence[Sequence[float]]) -> Straggler | None:
    """The rank that needs longer for a step than the others, without waits; None if they are even.

    `sums` has a row for each rank, in the order of `SUMS`.

    How much longer is against the median of the others. If on a rank nobody knows how long its step waits ("passes" is
    0), and the whole steps show no straggler, ranks are compared in what is around it: data and handlers.
    """
    ranks = [dict(zip(SUMS, row, strict=True)) for row in sums]
    if len(ranks) < 2 or min(each["steps"] for each in ranks) < _MIN_STEPS:
        return None
    found = _slowest(ranks, PHASES, "squares")
    if found is None and not all(each["passes"] for each in ranks):
        found = _slowest(ranks, _AROUND, "around_squares")
    return found


def _slowest(ranks: Sequence[StepTimes], phases: Sequence[str], squares: str) -> Straggler | None:
    means = [sum(each[phase] for phase in phases) / each["steps"] for each in ranks]
    slow = max(range(len(ranks)), key=means.__getitem__)
    others = [rank for rank in range(len(ranks)) if rank != slow]
    usual = median(means[rank] for rank in others)
    variances = [
        max(each[squares] / each["steps"] - mean**2, 0.0) / (each["steps"] - 1)
        for each, mean in zip(ranks, means, strict=True)
    ]
    error = math.sqrt(variances[slow] + median(variances[rank] for rank in others))
    late = means[slow] - usual
    whole = max(sum(each[phase] for phase in PHASES) / each["steps"] for each in ranks)
    if late <= max(_MIN_SHARE * whole, _MIN_ERRORS * error):
        return None

    def excess(phase: str) -> float:
        usual = median(ranks[rank][phase] / ranks[rank]["steps"] for rank in others)
        return ranks[slow][phase] / ranks[slow]["steps"] - usual

    return Straggler(rank=slow, phase=max(phases, key=excess), seconds=late)
