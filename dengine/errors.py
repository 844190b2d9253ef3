"""Every exception that dengine raises of its own. Each is importable from `dengine` too.

Wrong arguments are the built-in `TypeError`, `ValueError` and `KeyError`; the classes here are for what a caller
may want to tell apart.
"""

__all__ = [
    "CheckpointError",
    "DengineError",
    "LaunchError",
    "MetricStateError",
    "NotComputableError",
    "RankZeroCollectiveError",
    "RemoteRankError",
]


class DengineError(Exception):
    """The root of all of them."""


class LaunchError(DengineError, RuntimeError):
    """The launcher's variables (torchrun's, SLURM's) are half set, contradictory, or do not fit the machine."""


class RemoteRankError(DengineError, RuntimeError):
    """Another rank failed, so this one stops too. `rank` is the one that failed."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class RankZeroCollectiveError(DengineError, RuntimeError):
    """A collective was called where only rank 0 runs: the other ranks would never join it."""


class NotComputableError(DengineError, RuntimeError):
    """A metric was asked for its value before any rank had seen a sample."""


class MetricStateError(DengineError, RuntimeError):
    """The ranks do not hold the same metrics, so their states cannot be added up."""


class CheckpointError(DengineError, RuntimeError):
    """A checkpoint could not be written; what was there before is untouched. Raised on every rank."""
