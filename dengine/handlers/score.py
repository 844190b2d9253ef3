"""The score with which a handler compares models."""

from collections.abc import Callable

from dengine.engine import Engine
from dengine.handlers.arguments import check_function
from dengine.types import MetricValue

__all__ = ["check_score_function", "score_of"]


def check_score_function(value: object) -> None:
    """Check the argument. Raises: TypeError: it cannot be called as `score_function(engine)`."""
    if value is None:
        raise TypeError("score_function=None must be callable, as score_function(engine).")
    check_function("score_function", value, "engine")


def score_of(engine: Engine, score_function: Callable[[Engine], MetricValue], purpose: str) -> float:
    """The number that `score_function(engine)` gives. Waits for a tensor on a device.

    Raises:
        TypeError: it gives something else; `purpose` is part of the message.
    """
    score = score_function(engine)
    try:
        if isinstance(score, str | bytes):  # float() would read it
            raise TypeError("text is no number")
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"score_function gave {score!r}, but {purpose} compares one number a call.") from error
