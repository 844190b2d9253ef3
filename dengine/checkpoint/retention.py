"""Which saved checkpoints to keep. Pure: touches no file (storage.py does) and knows no rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Saved", "is_kept", "to_drop"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete. `score` is None where the newest are kept rather than the best."""

    path: Path
    step: int
    score: float | None = None


def is_kept(score: float | None, saved: Sequence[Saved], n_saved: int) -> bool:
    """Whether a checkpoint of `score` would be among the `n_saved` that are kept. NaN is never a best score.

    Of two with one score the older stays: it took less training.
    """
    if score is None:
        return True
    if math.isnan(score):
        return False
    return len(saved) < n_saved or any(one.score is not None and score > one.score for one in saved)


def to_drop(saved: Sequence[Saved], n_saved: int) -> list[Saved]:
    """What is too much: all but the `n_saved` newest or, where there are scores, best."""

    def worth(one: Saved) -> tuple[float, int]:
        return (0.0, one.step) if one.score is None else (one.score, -one.step)

    return sorted(saved, key=worth, reverse=True)[n_saved:]
