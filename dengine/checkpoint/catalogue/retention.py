"""Which saved checkpoints to keep. Pure: touches no file (disk/room.py does) and knows no rank."""

import math
from collections.abc import Sequence

from dengine.checkpoint.catalogue.entry import Entry

__all__ = ["is_kept", "to_drop"]


def is_kept(score: float, saved: Sequence[Entry], n_saved: int) -> bool:
    """Whether a checkpoint of `score` would be among the `n_saved` that are kept. NaN is never a best score.

    Of two with one score the older stays: it took less training.
    """
    if math.isnan(score):
        return False
    return len(saved) < n_saved or any(one.score is not None and score > one.score for one in saved)


def to_drop(saved: Sequence[Entry], new: Entry, n_saved: int) -> list[Entry]:
    """What is too much beside `new`: all but the `n_saved` newest or, if there are scores, best.

    Newest is what was saved last. What is ahead of `new` (a run that went on from an earlier step, or began anew in the
    same folder) counts as older than all that leads up to it; `new` itself is never dropped for being newest.
    """

    def worth(one: Entry) -> tuple[float, int]:
        if one.score is not None:
            return one.score, -one.sequence
        is_ahead = one.step is not None and new.step is not None and one.step > new.step
        return float(not is_ahead), one.sequence

    others = [one for one in saved if one.name != new.name]  # a step saved twice is one file
    return sorted([*others, new], key=worth, reverse=True)[n_saved:]
