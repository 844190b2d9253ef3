"""Which rank the others wait for: from times that are known, and on a clock of the test's own."""

import random
from typing import Any

import pytest
import torch
from torch import nn

from dengine.comm import waits
from dengine.comm.waits import listen, waiting
from dengine.handlers.phase_clock import PHASES, SUMS, DeviceStamps, HostStamps, PhaseClock
from dengine.handlers.straggler import find_straggler
from dengine.types import Straggler

USUAL = {"data": 2.0, "forward": 10.0, "backward": 20.0, "step": 3.0, "handlers": 5.0}


def row_of(steps: list[dict[str, float]], *, passes: int = 1) -> list[float]:
    """What a clock gives for these steps."""
    values = {
        "steps": float(len(steps)),
        "passes": float(passes),
        "squares": sum(sum(step.values()) ** 2 for step in steps),
        "around_squares": sum((step["data"] + step["handlers"]) ** 2 for step in steps),
        **{phase: sum(step[phase] for step in steps) for phase in PHASES},
    }
    return [values[name] for name in SUMS]


def noisy(generator: random.Random, num_steps: int, **more: float) -> list[dict[str, float]]:
    return [
        {phase: generator.gauss(mean, 0.1 * mean) + more.get(phase, 0.0) for phase, mean in USUAL.items()}
        for _ in range(num_steps)
    ]


@pytest.mark.parametrize("seed", range(100))
def test_a_slow_rank_and_its_phase_are_found_in_noise(seed: int) -> None:
    generator = random.Random(seed)
    size, phase = generator.choice([2, 3, 8, 64]), generator.choice(PHASES)
    slow = generator.randrange(size)
    rows = [row_of(noisy(generator, 30, **({phase: 12.0} if rank == slow else {}))) for rank in range(size)]
    found = find_straggler(rows)
    assert found is not None
    assert (found.rank, found.phase) == (slow, phase)
    assert found.seconds == pytest.approx(12.0, abs=3.0)


def test_even_ranks_have_no_straggler_in_ten_thousand_epochs() -> None:
    generator = random.Random(0)
    for _ in range(10_000):
        steps = [[generator.gauss(40.0, 8.0) for _ in range(5)] for _ in range(3)]
        rows = [row_of([{**dict.fromkeys(PHASES, 0.0), "forward": each} for each in times]) for times in steps]
        assert find_straggler(rows) is None


def test_one_long_step_is_no_straggler() -> None:
    even = [dict(USUAL) for _ in range(50)]
    saved = [*even[:-1], {**USUAL, "handlers": 2000.0}]
    assert find_straggler([row_of(saved), row_of(even)]) is None


def test_a_rank_that_is_slower_by_less_than_a_twentieth_is_not_named() -> None:
    usual, slower = [dict(USUAL)] * 9, [{**USUAL, "forward": 11.5}] * 9
    assert find_straggler([row_of(usual), row_of(slower)]) is None


def test_what_is_waited_is_the_distance_to_the_median_of_the_others() -> None:
    slow_node = [row_of([{**USUAL, "forward": more}] * 9) for more in (10.0, 10.0, 10.0, 10.0, 10.0, 30.0, 31.0)]
    assert find_straggler(slow_node) == Straggler(rank=6, phase="forward", seconds=21.0)


@pytest.mark.parametrize("phase", ["data", "handlers"])
def test_steps_whose_waits_are_unknown_leave_data_and_handlers(phase: str) -> None:
    """The others' steps are longer by what they wait."""
    slow = row_of([{**USUAL, phase: USUAL[phase] + 20.0}] * 9, passes=0)
    waits = row_of([{**USUAL, "step": USUAL["step"] + 20.0}] * 9, passes=0)
    assert find_straggler([waits, slow]) == Straggler(rank=1, phase=phase, seconds=20.0)


def test_an_epoch_without_enough_steps_names_nobody() -> None:
    usual, slow = dict(USUAL), {**USUAL, "data": 100.0}
    assert find_straggler([row_of([usual] * 2), row_of([slow] * 2)]) is None
    assert find_straggler([row_of([]), row_of([slow] * 9)]) is None
    assert find_straggler([row_of([slow] * 9)]) is None


class Device(DeviceStamps):
    """A GPU whose stream comes to an event when the test says so."""

    def __init__(self, host: Any) -> None:
        self.host, self.reached_s = host, -1.0

    def now(self) -> Any:
        return float(self.host())

    def is_past(self, stamp: Any) -> bool:
        return bool(stamp <= self.reached_s)

    def seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin)


class Now:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def do_step(clock: PhaseClock, now: Now) -> None:
    clock.begin_step()
    now.s += 1
    with waiting:  # data of other ranks
        now.s += 100
        with waiting:
            now.s += 100
    now.s += 1
    clock.switch("handlers")
    now.s += 4
    clock.begin_call()
    now.s += 8
    clock.switch("handlers")
    with waiting:
        now.s += 100
    clock.end_step()
    now.s += 1000  # between two steps


def test_waits_and_the_first_step_do_not_count() -> None:
    now = Now()
    clock = PhaseClock(HostStamps(now))
    listen(clock, is_on=True)
    try:
        for _ in range(4):
            do_step(clock, now)
    finally:
        listen(clock, is_on=False)
    assert clock.num_steps == 3
    assert clock.seconds == {"data": 6.0, "forward": 0.0, "backward": 0.0, "step": 24.0, "handlers": 12.0}
    assert (clock.squares, clock.around_squares) == (3 * 14.0**2, 3 * 6.0**2)
    assert waits._listeners == ()


def test_steps_of_a_device_are_read_when_it_has_come_to_their_end() -> None:
    now = Now()
    device = Device(now)
    clock = PhaseClock(device)
    for _ in range(3):
        do_step(clock, now)
    assert clock.num_steps == 0
    device.reached_s = now.s
    clock.read()
    assert clock.num_steps == 2


def test_a_step_that_fails_in_a_wait_leaves_the_clock_usable() -> None:
    now = Now()
    clock = PhaseClock(HostStamps(now))
    do_step(clock, now)
    clock.begin_step()
    clock.wait_begins()
    clock.start_epoch()
    do_step(clock, now)
    assert clock.num_steps == 1


def test_the_metrics_of_a_world_of_one_name_nobody() -> None:
    from dengine import Engine
    from dengine.handlers import ThroughputMonitor

    model = nn.Linear(2, 2)
    engine = Engine(lambda engine, batch: model(batch).sum().backward())
    ThroughputMonitor(print_line=False).attach(engine)
    state = engine.run([torch.ones(3, 2)] * 5)
    assert state.straggler is None
    assert "straggler_rank" not in state.metrics
