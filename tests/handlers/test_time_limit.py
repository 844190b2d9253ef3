"""A run ends in time."""

import time
from typing import Any

import pytest

from dengine import Engine, Events
from dengine.handlers import TimeLimit


def test_the_clock_runs_from_when_the_handler_was_made() -> None:
    limit = TimeLimit(0.05)
    time.sleep(0.06)
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.ITERATION_COMPLETED, limit)
    assert trainer.run(range(1000)).iteration == 1


def test_a_run_that_is_done_in_time_is_whole() -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.ITERATION_COMPLETED, TimeLimit(1000))
    assert trainer.run(range(5), max_epochs=2).iteration == 10


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        TimeLimit(seconds)


@pytest.mark.parametrize("seconds", ["60", None, True])
def test_what_is_no_number_is_refused(seconds: Any) -> None:
    with pytest.raises(TypeError, match="number of seconds"):
        TimeLimit(seconds)
