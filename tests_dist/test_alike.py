"""Ranks that fail alike, one after the other, or only seem to fail: what ends the group, and what does not."""

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from dengine import Engine, Events, distributed


def alike(rank: int, size: int, delay_s: float) -> str:
    """All ranks raise the same at one place, one after the other, and handle it; many times."""
    with distributed.process_group(timeout=300):
        for number in range(20 if not delay_s else 2):

            def step(engine: Engine, batch: int, number: int = number) -> None:
                time.sleep(delay_s * rank)
                if batch == 2:
                    raise ValueError(number)
                if not delay_s:
                    distributed.barrier("step")

            with pytest.raises(ValueError, match=f"^{number}$"):
                Engine(step).run(range(4))
            assert distributed.all_reduce(1.0) == size
    return "done"


@pytest.mark.parametrize("delay_s", [0.0, 0.2])
def test_an_error_that_all_ranks_handle_is_their_own_on_each(delay_s: float) -> None:
    assert run_ranks(alike, 3, delay_s, init=False) == ["done"] * 3


def skewed(rank: int, size: int) -> list[str]:
    """Rank 0 raises before a collective that rank 1 has begun already; both handle it, and reduce once more."""

    def step(engine: Engine, batch: int) -> None:
        if rank == 0 and batch == 3:
            raise ValueError("before its collective")
        work = dist.all_reduce(torch.full((1,), 100.0), async_op=True)
        if rank == 0 or batch < 3:
            work.wait()
        time.sleep(0.1)

    told = []
    try:
        with distributed.process_group(timeout=300):
            try:
                Engine(step).run(range(10))
            except Exception as error:
                told.append(type(error).__name__)
            told.append(str(distributed.all_reduce(1.0)))
    except Exception as error:
        told.append(f"{type(error).__name__} {getattr(error, 'rank', None)}")
    return told


def test_ranks_that_are_a_collective_apart_get_no_number_any_more() -> None:
    assert run_ranks(skewed, 2, init=False) == [
        ["ValueError", "RemoteRankError 0"],
        ["RemoteRankError", "RemoteRankError 0"],
    ]


def raised_again(rank: int, size: int) -> None:
    """All ranks keep an error that they handle; later one raises it once more."""
    kept: list[Exception] = []
    with distributed.process_group(timeout=300):
        try:
            Engine(lambda engine, batch: [][1]).run([1])
        except IndexError as error:
            kept.append(error)
        distributed.barrier("kept")
        trainer = Engine(lambda engine, batch: time.sleep(0.02))

        @trainer.on(Events.ITERATION_COMPLETED(once=5))
        def again(engine: Engine) -> None:
            if rank == 0:
                raise kept[0]

        trainer.run(range(500))


def test_an_error_that_was_handled_once_is_told_when_it_is_raised_again() -> None:
    first, second = run_ranks(raised_again, 2, init=False, expect_failures=True, deadline_s=30)
    assert first.error_type == "IndexError"
    assert second.error_type == "RemoteRankError"
    assert "in handler raised_again.<locals>.again of ITERATION_COMPLETED" in second.error_message


def leaves_a_child(rank: int, size: int) -> None:
    """What a killed rank had forked holds its connections open."""
    with distributed.process_group(timeout=300):
        if rank == 1 and os.fork() == 0:
            time.sleep(250)
            os._exit(0)

        def step(engine: Engine, batch: int) -> None:
            if rank == 1 and batch == 3:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            distributed.barrier("step")

        Engine(step).run(range(10))


def test_a_killed_rank_is_missed_although_its_child_lives_on() -> None:
    first, second = run_ranks(leaves_a_child, 2, init=False, expect_failures=True, deadline_s=30)
    assert second.exitcode == -signal.SIGKILL
    assert first.error_type == "RemoteRankError"
    assert first.error_message.startswith("Rank 1 vanished")
    assert first.seconds < 100


def holds_the_interpreter(rank: int, size: int) -> Any:
    """A step in C that lets no other thread run, on one rank, while the others wait for it; nobody hangs."""
    with distributed.process_group(timeout=300, stall_timeout=60):
        started = time.perf_counter()
        sum(range(10_000_000))
        additions = int(10_000_000 * 2.3 / (time.perf_counter() - started))  # longer than an answer is waited for
        trainer = Engine(lambda engine, batch: None)

        @trainer.on(Events.ITERATION_COMPLETED)
        def evaluate(engine: Engine) -> None:
            if rank == 0:
                Engine(lambda engine, batch: sum(range(additions)) and None, distributed=False).run(range(4))
            distributed.barrier("evaluated")

        return trainer.run(range(1)).iteration


def test_a_rank_that_holds_the_interpreter_for_a_while_is_not_taken_for_frozen() -> None:
    assert run_ranks(holds_the_interpreter, 2, init=False, deadline_s=90) == [1, 1]


def in_two_threads(rank: int, size: int) -> list[str]:
    import threading

    told: list[str] = []
    with distributed.process_group(timeout=300):
        begun = threading.Event()

        def second() -> None:
            begun.wait()
            try:
                Engine(lambda engine, batch: None).run([1])
            except RuntimeError as error:
                told.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        trainer = Engine(lambda engine, batch: begun.set() or thread.join())
        trainer.run([1])
    return told


def test_a_second_shared_run_in_another_thread_is_refused() -> None:
    for told in run_ranks(in_two_threads, 2, init=False):
        assert "another thread" in told[0]
