"""The report of a rank's failure, and the exceptions that the others raise for it."""

import builtins
import json
import os
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Literal, TypeAlias, get_args

from dengine.errors import RemoteInterrupt, RemoteRankError, StallError

__all__ = [
    "Failure",
    "Level",
    "cause_chain",
    "frames_of",
    "in_brackets",
    "is_of_backend",
    "line_of",
    "remove_error_file",
    "repr_of",
    "traceback_of",
    "where_text",
    "write_error_file",
]

Kind: TypeAlias = Literal["raised", "vanished", "stalled"]

_TRACEBACK_CHARS = 16_000  # the store holds it in memory, and every rank reads it
_LINE_CHARS = 2_000
_CHAIN_LENGTH = 32  # causes in a traceback; a longer chain is shown without its middle
_NUM_LEAVES = 1_000  # errors of a group that are examined
_GROUP: Any = getattr(builtins, "BaseExceptionGroup", ())  # Python 3.11
# Read from the message: below DDP and autograd a broken connection comes out as a bare RuntimeError.
_BACKEND_WORDS = ("gloo", "nccl", "processgroup", "c10d", "tcpstore", "closed by peer", "reset by peer", "broken pipe")


def in_brackets(place: str) -> str:
    """A position on the mesh in brackets, to follow the number of a rank; "" without one."""
    return f" ({place})" if place else ""


@dataclass(frozen=True)
class Level:
    """The position of one engine, with a text for it in `doing`. An engine in a handler of another is one more
    level.
    """

    epoch: int
    iteration: int
    doing: str
    event: str | None = None
    handler: str | None = None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Level":
        """The level that `to_dict` gave. Raises: TypeError: the content is wrong."""
        level = cls(**fields)
        text_or_none = (str, type(None))
        _check_types(level, epoch=int, iteration=int, doing=str, event=text_or_none, handler=text_or_none)
        return level

    def __str__(self) -> str:
        return f"epoch {self.epoch}, iteration {self.iteration}, {self.doing}"


@dataclass(frozen=True)
class Failure:
    """The failure of a rank that raised, vanished or stalled. `run` is the number of the run that it left, if any.

    `place` is the position of the rank on the mesh, if there is one.
    """

    kind: Kind
    rank: int
    error: str  # one line
    where: tuple[Level, ...] = ()  # outermost engine first
    traceback: str = ""
    run: int | None = None
    started: int = -1  # the position that the rank had started in that run, see `Run.started`
    is_frozen: bool = False  # the rank does not even answer a probe
    is_interrupt: bool = False  # Ctrl-C
    place: str = ""

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
        text += f"\n  Rank {self.rank}{in_brackets(self.place)} {is_or_was} {where_text(self.where)}."
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

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Failure":
        """The failure that `to_dict` gave. Raises: TypeError, ValueError, KeyError: the content is wrong."""
        failure = cls(**{**fields, "where": tuple(Level.from_dict(level) for level in fields["where"])})
        _check_types(failure, rank=int, error=str, traceback=str, run=(int, type(None)), started=int)
        _check_types(failure, is_frozen=bool, is_interrupt=bool, place=str)
        if failure.kind not in get_args(Kind):
            raise ValueError(f"kind={failure.kind!r}")
        return failure


def _check_types(value: object, **types: type | tuple[type, ...]) -> None:
    for name, kind in types.items():
        if not isinstance(getattr(value, name), kind):
            raise TypeError(f"{name}={getattr(value, name)!r}")


def where_text(where: Iterable[Level]) -> str:
    return "at " + ", and there at ".join(map(str, where)) if where else "outside of a run"


def traceback_of(error: BaseException) -> str:
    """The traceback of `error` and of its causes. Never raises, whatever the methods and links of the exceptions do."""
    chain = cause_chain(error)
    try:
        text = _plain_traceback(chain) if len(chain) > _CHAIN_LENGTH else "".join(traceback.format_exception(error))
    except Exception:
        text = _plain_traceback(chain)
    return text if len(text) <= _TRACEBACK_CHARS else "...\n" + text[-_TRACEBACK_CHARS:]


def _plain_traceback(chain: list[BaseException]) -> str:
    """The frames and the text of each of `chain`, without calling their own methods for formatting."""
    half = _CHAIN_LENGTH // 2
    shown = [*chain[:half], None, *chain[-half:]] if len(chain) > _CHAIN_LENGTH else [*chain]
    parts = []
    for each in reversed(shown):
        if each is None:
            parts.append(f"... and {len(chain) - 2 * half} more ...\n")
            continue
        frames = "".join(traceback.format_tb(each.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{line_of(each)}\n")
    return "\nThis led to:\n\n".join(parts)


def cause_chain(error: BaseException, *, with_context: bool = True) -> list[BaseException]:
    """`error` and its causes, in the order of a traceback; each once, even if they name each other in a circle."""
    chain: list[BaseException] = []
    seen = set[int]()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        chain.append(at)
        seen.add(id(at))
        cause = at.__cause__
        is_context = cause is None and with_context and not at.__suppress_context__
        at = at.__context__ if is_context else cause
    return chain


def frames_of(error: BaseException, here: FrameType) -> list[FrameType]:
    """The frames from the outermost one to the one that raised `error`; `here` is the frame that handles it."""
    outer = []
    frame: FrameType | None = here
    while frame is not None:
        outer.append(frame)
        frame = frame.f_back
    inner = [each for each, _ in traceback.walk_tb(error.__traceback__)]
    return outer[::-1] + [each for each in inner if each is not here]


def is_of_backend(error: BaseException) -> bool:
    """Whether `error` may be a broken connection, which is what a rank sees when another one fails.

    A group of exceptions counts if all of them do.
    """
    return any(all(map(_is_backends, _leaves_of(each))) for each in cause_chain(error, with_context=False))


def _is_backends(error: BaseException) -> bool:
    is_bare = type(error) is RuntimeError or str(type(error).__module__).startswith("torch")
    if not isinstance(error, RuntimeError) or not is_bare:
        return False
    text = line_of(error).lower()
    return any(word in text for word in _BACKEND_WORDS)


def _leaves_of(error: BaseException) -> list[BaseException]:
    """The exceptions of a group, and of groups within it; `error` itself if it is no group."""
    leaves: list[BaseException] = []
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < _NUM_LEAVES:
        at = waiting.pop()
        if id(at) in seen:
            continue
        seen.add(id(at))
        if isinstance(at, _GROUP):
            waiting.extend(at.exceptions)
        else:
            leaves.append(at)
    return leaves or [error]


def line_of(error: BaseException) -> str:
    """`error` in one line, whatever its `__str__` does."""
    try:
        text = str(error)
    except BaseException as failure:  # an exit of the process would be reported instead of `error`
        text = f"(its text is not available: {type(failure).__qualname__})"
    text = text if len(text) <= _LINE_CHARS else text[:_LINE_CHARS] + " ..."
    return f"{type(error).__qualname__}: {text}" if text else type(error).__qualname__


def repr_of(error: BaseException) -> str:
    """`repr(error)`, or `line_of(error)` if that fails."""
    try:
        return repr(error)
    except BaseException:
        return line_of(error)


def remove_error_file() -> None:
    """Remove the file for torchrun: the failure was handled, and a later one must not be shown with its traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            os.remove(path)


def write_error_file(message: str, traceback_text: str, *, is_cause: bool) -> None:
    """Write the error of this process for torchrun's summary, as `@record` of `torch.distributed.elastic` would.

    The summary calls the earliest failure the root cause. So if this rank stops only because another one failed (not
    `is_cause`), its time is a minute later. The summary shows only the traceback, so the culprit's name is in it, too:
    torchrun takes a process with exit code 0 for no failure, and then shows an innocent rank.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    timestamp = str(int(time.time()) + (0 if is_cause else 60))
    shown = traceback_text if is_cause else message
    extra = {"py_callstack": shown or message, "timestamp": timestamp}
    with suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
