"""Decide which saved checkpoints to keep. Pure: touches no file (disk/space.py does) and knows no rank."""

import math
from collections.abc import Sequence

from dengine.checkpoint.catalogue.entry import Entry

__all__ = ["is_kept", "to_drop"]


def is_kept(score: float, saved: Sequence[Entry], n_saved: int) -> bool:
    """Whether a checkpoint with `score` would be among the `n_saved` that are kept. NaN is never a best score.

    Of two with the same score the older stays: it took less training.
    """
    if math.isnan(score):
        return False
    return len(saved) < n_saved or any(one.score is not None and score > one.score for one in saved)


def to_drop(saved: Sequence[Entry], new: Entry, n_saved: int) -> list[Entry]:
    """The checkpoints to remove when `new` is saved: all but the `n_saved` newest or, if there are scores, best.

    The newest one was saved last. Checkpoints with a later step than `new` (of a run that was resumed from an earlier
    step, or restarted in the same folder) count as older than those before it. `new` itself is dropped only for its
    score.
    """

    def worth(one: Entry) -> tuple[float, int]:
        if one.score is not None:
            return one.score, -one.sequence
        is_ahead = one.step is not None and new.step is not None and one.step > new.step
        return float(not is_ahead), one.sequence

    others = [one for one in saved if one.name != new.name]  # a step saved twice is one file
    return sorted([*others, new], key=worth, reverse=True)[n_saved:]
