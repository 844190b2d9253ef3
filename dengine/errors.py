"""Every exception that dengine raises of its own. Each is importable from `dengine` too.

Wrong arguments are the built-in `TypeError`, `ValueError` and `KeyError`; the classes here are for what a caller
may want to tell apart.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConsistencyError",
    "CorruptCheckpointError",
    "DengineError",
    "LaunchError",
    "MetricStateError",
    "MissingKeyError",
    "NotComputableError",
    "RankZeroCollectiveError",
    "RemoteInterrupt",
    "RemoteRankError",
    "StallError",
    "TrackingError",
]


class DengineError(Exception):
    """The root of all of them."""


class LaunchError(DengineError, RuntimeError):
    """The launcher's variables (torchrun's, SLURM's) are half set, contradictory, or do not fit the machine; or what
    the launcher started did not meet, or has lost its way to meet.
    """


class _AtRank(DengineError, RuntimeError):
    """Something that happened on one rank, and is raised on others.

    Attributes:
        rank: the one where it happened.
        epoch, iteration, event, handler: where that rank was; None outside of a run, or of a handler.
        remote_traceback: of the exception there; "" where there was none.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        epoch: int | None = None,
        iteration: int | None = None,
        event: str | None = None,
        handler: str | None = None,
        remote_traceback: str = "",
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.epoch, self.iteration = epoch, iteration
        self.event, self.handler = event, handler
        self.remote_traceback = remote_traceback


class RemoteRankError(_AtRank):
    """Another rank failed or vanished, so this one stops too."""


class RemoteInterrupt(RemoteRankError, KeyboardInterrupt):
    """Another rank was interrupted (Ctrl-C), so this one is too: a script's `except KeyboardInterrupt` holds on all."""


class StallError(_AtRank):
    """No rank made progress for `stall_timeout`, or none can any more; `rank` is the one that the others wait for."""


class ConsistencyError(DengineError, RuntimeError):
    """What must be the same on all ranks is not: parameters, their names or shapes, or the collective called."""


class RankZeroCollectiveError(DengineError, RuntimeError):
    """A collective was called where only rank 0 runs: the other ranks would never join it."""


class NotComputableError(DengineError, RuntimeError):
    """A metric was asked for its value before any rank had seen a sample.

    Attributes:
        reason: the message without the metric's name.
    """

    def __init__(self, message: str = "nothing was seen", *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


class MetricStateError(DengineError, RuntimeError):
    """The ranks do not hold the same metrics, so their states cannot be added up."""


class CheckpointError(DengineError, RuntimeError):
    """A checkpoint could not be written or loaded; files and objects are as they were. Raised on every rank."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is not what was saved: truncated, changed or gone. Nothing of it was used."""


class ConfigError(DengineError, ValueError):
    """A configuration cannot be read, merged, or used as it is; the message names the key, the file and the line."""


class MissingKeyError(ConfigError, AttributeError, KeyError):
    """A configuration has no such key: an `AttributeError` and a `KeyError` too, so that `hasattr` and `get` work."""

    __str__ = Exception.__str__  # a KeyError's is its repr


class TrackingError(DengineError, RuntimeError):
    """A run cannot be recorded, or what was recorded is damaged."""
