"""What the engine's tests share: an engine that does nothing, and the log of a run."""

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from dengine import Engine, Events

Entry: TypeAlias = tuple[str, int, int]  # event, state.epoch, state.iteration
Log: TypeAlias = list[Entry]


def echo(engine: Engine, batch: Any) -> Any:
    return batch


def record(engine: Engine, log: Log | None = None) -> Log:
    """Have every event of `engine` written down, before any other handler of its priority."""
    entries: Log = [] if log is None else log
    for event in Events:

        def note(fired: Engine, name: str = event.name) -> None:
            entries.append((name, fired.state.epoch, fired.state.iteration))

        engine.on(event, lambda fired, note=note: note(fired), priority=1000)
    return entries


@pytest.fixture
def engine() -> Engine:
    return Engine(echo)


@pytest.fixture
def recorded() -> Callable[..., Log]:
    return record
