"""What is counted and what is not, by a clock that the test moves."""

import math
import time
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import Timer


class Clock:
    """Seconds that pass only where the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def passing(clock: Clock, seconds: float) -> Any:
    def handler(engine: Engine) -> None:
        clock.now_s += seconds

    return handler


def trainer_of(clock: Clock) -> Engine:
    """Loading takes 1 s, a step 2 s, other handlers of the iteration 4 s, those of the epoch 8 s."""
    trainer = Engine(lambda engine, batch: passing(clock, 2)(engine))
    trainer.on(Events.GET_BATCH_STARTED, passing(clock, 1))
    trainer.on(Events.ITERATION_COMPLETED, passing(clock, 4))
    trainer.on(Events.EPOCH_COMPLETED, passing(clock, 8))
    return trainer


@pytest.mark.parametrize(
    ("events", "value", "step_time"),
    [
        # Two epochs of three iterations. To the last step: 15 s each but for the last handlers, 8 s between them.
        ({}, 2 * 21 + 16, (21 + 8 + 17) / 6),
        ({"start": Events.EPOCH_STARTED}, 21 + 8, 17 / 3),
        ({"resume": Events.ITERATION_STARTED, "pause": Events.ITERATION_COMPLETED | Events.EPOCH_STARTED}, 12, 2),
        ({"step": None}, 58, math.nan),
        ({"step": Events.EPOCH_COMPLETED}, 58, (21 + 8 + 21) / 2),
    ],
)
def test_seconds_and_seconds_a_step(clock: Clock, events: dict[str, Any], value: float, step_time: float) -> None:
    trainer, timer = trainer_of(clock), Timer()
    timer.attach(trainer, **events)
    clock.now_s += 1000  # before the run: not counted
    trainer.run(range(3), max_epochs=2)
    clock.now_s += 1000  # after it
    assert timer.value() == value
    assert timer.step_time() == pytest.approx(step_time, nan_ok=True)


def test_the_seeds_snippet_reads_it_at_the_end_of_an_epoch(clock: Clock) -> None:
    trainer, timer = trainer_of(clock), Timer()
    timer.attach(trainer, start=Events.STARTED, step=Events.ITERATION_COMPLETED)
    lines: list[str] = []
    trainer.on(
        Events.EPOCH_COMPLETED,
        lambda engine: lines.append(f"{timer.value():.2f}s {timer.step_time():.4f}s"),
        priority=1,
    )
    trainer.run(range(3))
    assert lines == ["21.00s 5.6667s"]


def test_by_hand_it_runs_from_the_start_and_reset_begins_anew(clock: Clock) -> None:
    timer = Timer()
    clock.now_s += 3
    assert timer.value() == 3
    assert math.isnan(timer.step_time())
    timer.reset()
    clock.now_s += 2
    assert timer.value() == 2


def test_a_run_that_fails_stops_it_and_the_next_begins_anew(clock: Clock) -> None:
    trainer, timer = Engine(lambda engine, batch: passing(clock, 1 / batch)(engine)), Timer()
    timer.attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.run([1, 0])
    clock.now_s += 50
    assert timer.value() == 1
    trainer.run([0.5])
    assert (timer.value(), timer.step_time()) == (2, 2)


def test_an_event_that_is_not_registered_attaches_nothing(clock: Clock) -> None:
    trainer, timer = Engine(lambda engine, batch: None), Timer()
    with pytest.raises(ValueError, match="nope"):
        timer.attach(trainer, resume="nope")
    trainer.run([1])
    clock.now_s += 5
    assert timer.value() == 5  # still its own clock, not stopped by the run


@pytest.mark.parametrize("synchronize", [False, True])
def test_it_waits_for_the_device_only_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch, synchronize: bool) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    trainer, timer = Engine(lambda engine, batch: None), Timer(synchronize=synchronize)
    timer.attach(trainer)
    trainer.run(range(3))
    assert bool(waits) is synchronize
