"""Tell those who measure a run when this rank only waits for others, in a collective."""

from types import TracebackType
from typing import Protocol

__all__ = ["WaitListener", "listen", "waiting"]


class WaitListener(Protocol):
    """Waits may be nested: `wait_begins` is then called again before `wait_ended`."""

    def wait_begins(self) -> None: ...
    def wait_ended(self) -> None: ...


class _Waiting:
    """A context in which this rank waits for others. Without a listener it costs next to nothing."""

    def __enter__(self) -> None:
        for each in _listeners:
            each.wait_begins()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for each in _listeners:
            each.wait_ended()


waiting = _Waiting()
# Of the process, not of a world: what waits is its thread, whatever the group. Empty unless a run is measured.
_listeners: tuple[WaitListener, ...] = ()


def listen(listener: WaitListener, *, is_on: bool) -> None:
    """Tell `listener` of each wait from now on, or of none any more. Not within a wait."""
    global _listeners
    others = tuple(each for each in _listeners if each is not listener)
    _listeners = (*others, listener) if is_on else others
