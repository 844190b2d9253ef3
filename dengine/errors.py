"""The exceptions of dengine. Each can also be imported from `dengine`.

Wrong arguments raise the built-in `TypeError`, `ValueError` and `KeyError`; the classes here are for failures that a
caller may want to handle by kind.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConsistencyError",
    "CorruptCheckpointError",
    "DengineError",
    "GuardError",
    "LaunchError",
    "MetricStateError",
    "MissingKeyError",
    "NotComputableError",
    "RankZeroCollectiveError",
    "RemoteInterrupt",
    "RemoteRankError",
    "ReplayError",
    "StallError",
    "TrackingError",
]


class DengineError(Exception):
    """The base class of all exceptions of dengine."""


class LaunchError(DengineError, RuntimeError):
    """The ranks cannot form a group: the launcher's variables (torchrun's, SLURM's) are incomplete, contradict each
    other or do not fit the machine, or the ranks could not find or reach each other.
    """


class _AtRank(DengineError, RuntimeError):
    """A failure of one rank, raised on the others.

    Attributes:
        rank: the rank where it happened.
        epoch, iteration, event, handler: the position of that rank; None outside of a run, or of a handler.
        remote_traceback: of the exception there; "" if there was none.
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
    """Another rank was interrupted (Ctrl-C), so this one is too: `except KeyboardInterrupt` works on every rank."""


class StallError(_AtRank):
    """No rank made progress for `stall_timeout`, or no rank can any more; the others wait for `rank`."""


class ConsistencyError(DengineError, RuntimeError):
    """The ranks differ in something that must be the same: parameters, their names or shapes, or the collective
    called.
    """


class RankZeroCollectiveError(DengineError, RuntimeError):
    """A collective was called in code that only rank 0 runs: the other ranks would never join it."""


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
    """A checkpoint is damaged: cut short, changed or missing. Nothing of it was used."""


class ConfigError(DengineError, ValueError):
    """A configuration cannot be read, merged or used. The message names the key, the file and the line."""


class MissingKeyError(ConfigError, AttributeError, KeyError):
    """A configuration lacks a key. Also an `AttributeError` and a `KeyError`, so that `hasattr` and `get` work."""

    __str__ = Exception.__str__  # a KeyError's is its repr


class GuardError(DengineError, RuntimeError):
    """A `Guard` has left out more steps than it may. Raised on every rank.

    Attributes:
        iterations: those of the bad steps within the last 1000.
        losses: of this rank, in the last of them.
    """

    def __init__(self, message: str, *, iterations: list[int], losses: list[float]) -> None:
        super().__init__(message)
        self.iterations, self.losses = iterations, losses


class ReplayError(DengineError, RuntimeError):
    """A step that was run twice, from the same generators and buffers, gave other gradients: a device that computes
    wrongly, or a step that is not deterministic. Raised on every rank.

    Attributes:
        parameter: the name of the first parameter whose gradient differs; None if the step cannot be repeated.
        rank: the rank where it differs before gradients are averaged; None if that cannot be told.
    """

    def __init__(self, message: str, *, parameter: str | None, rank: int | None) -> None:
        super().__init__(message)
        self.parameter, self.rank = parameter, rank


class TrackingError(DengineError, RuntimeError):
    """A run cannot be recorded, or what was recorded is damaged."""
