"""What a rank tells the others of a failure, and what they raise for it."""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Literal, TypeAlias

from dengine.errors import RemoteInterrupt, RemoteRankError, StallError

__all__ = [
    "Failure",
    "Level",
    "frames_of",
    "is_of_backend",
    "line_of",
    "remove_error_file",
    "say",
    "traceback_of",
    "where_text",
    "write_error_file",
]

Kind: TypeAlias = Literal["raised", "vanished", "stalled"]

_TRACEBACK_CHARS = 16_000  # the store holds it in memory, and every rank reads it
# Read from the message: below DDP and autograd a broken connection comes out as a bare RuntimeError.
_BACKEND_WORDS = ("gloo", "nccl", "processgroup", "c10d", "tcpstore", "closed by peer", "reset by peer", "broken pipe")


@dataclass(frozen=True)
class Level:
    """Where one engine stands; `doing` says it in words. An engine in a handler of another is one more level."""

    epoch: int
    iteration: int
    doing: str
    event: str | None = None
    handler: str | None = None

    def __str__(self) -> str:
        return f"epoch {self.epoch}, iteration {self.iteration}, {self.doing}"


@dataclass(frozen=True)
class Failure:
    """A rank that raised, vanished or stalled. `run` is the number of the run that it left by raising, if any."""

    kind: Kind
    rank: int
    error: str  # one line
    where: tuple[Level, ...] = ()  # outermost engine first
    traceback: str = ""
    run: int | None = None
    begun: int = -1  # how far that run was begun
    is_frozen: bool = False  # it does not even answer
    is_interrupt: bool = False  # Ctrl-C

    def message(self) -> str:
        if self.kind == "raised":
            text = f"Rank {self.rank} failed, so this rank stops too: {self.error}"
        elif self.kind == "vanished":
            text = f"Rank {self.rank} vanished, so this rank stops too: {self.error}"
        else:
            text = self.error
        is_or_was = {"raised": "was", "vanished": "was last seen", "stalled": "is"}[self.kind]
        if self.is_frozen:
            is_or_was = "was last seen"
        text += f"\n  Rank {self.rank} {is_or_was} {where_text(self.where)}."
        return text + (f"\n\nOn rank {self.rank}:\n{self.traceback}" if self.traceback else "")

    def as_error(self) -> RemoteRankError | StallError:
        at = self.where[0] if self.where else None
        kind: type[RemoteRankError | StallError] = StallError if self.kind == "stalled" else RemoteRankError
        if self.is_interrupt:
            kind = RemoteInterrupt
        return kind(
            self.message(),
            rank=self.rank,
            epoch=None if at is None else at.epoch,
            iteration=None if at is None else at.iteration,
            event=None if at is None else at.event,
            handler=None if at is None else at.handler,
            remote_traceback=self.traceback,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Failure":
        return cls(**{**told, "where": tuple(Level(**level) for level in told["where"])})


def where_text(where: Iterable[Level]) -> str:
    return "at " + ", and there at ".join(map(str, where)) if where else "outside of a run"


def traceback_of(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    return text if len(text) <= _TRACEBACK_CHARS else "...\n" + text[-_TRACEBACK_CHARS:]


def frames_of(error: BaseException, here: FrameType) -> list[FrameType]:
    """The frames from the outermost one to where `error` was raised; `here` is where it is being handled."""
    outer = []
    frame: FrameType | None = here
    while frame is not None:
        outer.append(frame)
        frame = frame.f_back
    inner = [each for each, _ in traceback.walk_tb(error.__traceback__)]
    return outer[::-1] + [each for each in inner if each is not here]


def is_of_backend(error: BaseException | None) -> bool:
    """Whether `error` may be a broken connection: what a rank sees of another one's failure."""
    while error is not None:
        is_bare = type(error) is RuntimeError or type(error).__module__.startswith("torch")
        if isinstance(error, RuntimeError) and is_bare:
            text = str(error).lower()
            if any(word in text for word in _BACKEND_WORDS):
                return True
        error = error.__cause__
    return False


def line_of(error: BaseException) -> str:
    """`error` in one line, whatever its `__str__` does."""
    try:
        text = str(error)
    except Exception as failure:
        text = f"(its text cannot be had: {type(failure).__qualname__})"
    return f"{type(error).__qualname__}: {text}" if text else type(error).__qualname__


def remove_error_file() -> None:
    """The failure was handled: what comes later must not be shown with its traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            os.remove(path)


def write_error_file(message: str, traceback_text: str, *, is_cause: bool) -> None:
    """Tell torchrun what its summary is to show for this process, as `torch.distributed.elastic`'s `@record` would.

    The summary calls the earliest failure the root cause: where this rank stops only because another one failed
    (not `is_cause`), its own comes a minute later.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    timestamp = str(int(time.time()) + (0 if is_cause else 60))
    extra = {"py_callstack": traceback_text, "timestamp": timestamp}
    with suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def say(text: str) -> None:
    """One write, so that the lines of several ranks do not mix."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
