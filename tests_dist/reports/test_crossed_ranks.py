"""Ranks that wait for each other in different places are told why, and what to do, long before stall_timeout."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcome, run_ranks
from torch import nn

from dengine import Engine, Events, distributed
from dengine.control.deadlock import cause, is_certain
from dengine.handlers import Checkpoint
from dengine.metrics import Average


def crossed(rank: int, size: int, fault: str, stall_timeout: float, folder: str) -> None:
    """A training with DDP in which rank 0 or 1 does something that takes all ranks, or leaves it out."""
    with distributed.process_group(timeout=120, stall_timeout=stall_timeout):
        model = distributed.prepare_model(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        checkpoint = Checkpoint({"model": model}, folder)

        def train_step(engine: Engine, batch: torch.Tensor) -> float:
            loss = model(batch).sum()
            if fault == "untouched" and rank == 1 and engine.state.iteration == 4:
                loss = torch.ones(1, requires_grad=True).sum()
            if not (fault == "skipped" and rank == 1 and engine.state.iteration == 4):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss)

        def evaluate(engine: Engine) -> None:
            evaluator = Engine(lambda engine, batch: batch)
            if rank == 0:
                evaluator.run([1.0])

        def save(engine: Engine) -> None:
            if rank == 0:
                checkpoint(engine)

        def begin(engine: Engine) -> None:
            if rank == 0:
                engine.on(Events.ITERATION_COMPLETED(once=2), checkpoint)

        trainer = Engine(train_step)
        if fault != "untouched":  # its ranks meet at the end of the group only
            trainer.add_metric(Average(), "loss")
        match fault:
            case "evaluator":
                trainer.on(Events.ITERATION_COMPLETED(once=3), evaluate)
            case "saved by hand":
                trainer.on(Events.ITERATION_COMPLETED(once=3), save)
            case "attached late":
                trainer.on(Events.STARTED, begin)
        trainer.run([torch.ones(2, 4)] * (6 if fault == "batches" and rank == 1 else 8), max_epochs=2)
        if fault == "after":
            evaluate(trainer)


ADVICE = {
    "evaluator": ("distributed=False", "runs an Engine that rank 1 does not run", "evaluate"),
    "after": ("distributed=False", "runs an Engine that rank 1 does not run", "the end of process_group()"),
    "saved by hand": ("on every rank", "Handler", "save"),
    "attached late": ("attach it on every rank", "Checkpoint"),
    "skipped": ("skipped backward()", "its loss did not touch the model"),
    "untouched": ("skipped backward()", "its loss did not touch the model"),
    "batches": ("have ended after iteration 6", "same number of batches"),
}


def check(outcomes: list[Outcome[Any]], fault: str) -> None:
    culprit = 0 if fault in ("evaluator", "after", "saved by hand", "attached late") else 1
    for outcome in outcomes:
        assert outcome.error_type == "StallError", outcome
        for words in (*ADVICE[fault], f"Rank {culprit} has come to another place", f"Rank {culprit} is "):
            assert words in outcome.error_message, (words, outcome.error_message)
        assert "raise stall_timeout" not in outcome.error_message


@pytest.mark.parametrize("fault", ["evaluator", "skipped", "after"])
def test_it_is_told_within_seconds_with_a_stall_timeout_of_an_hour(tmp_path: Path, fault: str) -> None:
    check(run_ranks(crossed, 2, fault, 3600, str(tmp_path), init=False, expect_failures=True, deadline_s=90), fault)


@pytest.mark.parametrize("fault", ["saved by hand", "attached late", "untouched", "batches"])
def test_a_stall_tells_the_true_cause_and_the_way_out(tmp_path: Path, fault: str) -> None:
    check(run_ranks(crossed, 2, fault, 3, str(tmp_path), init=False, expect_failures=True, deadline_s=90), fault)


def calls_alone(rank: int, size: int, what: str) -> None:
    with distributed.process_group(timeout=120, stall_timeout=3):
        model = distributed.prepare_model(nn.Linear(4, 1))

        def step(engine: Engine, batch: torch.Tensor) -> None:
            if rank == 1 and engine.state.iteration == 3:
                dist.barrier() if what == "torch" else distributed.barrier("alone")
            model(batch).sum().backward()

        Engine(step).run([torch.ones(2, 4)] * 5)


WORDS = {
    "torch": ("different collectives of torch", "in backward()", "in step)", "same order on every rank"),
    "own": ("Or rank 0 does not call barrier('alone'): call it on every rank",),
}


@pytest.mark.parametrize("what", WORDS)
def test_a_collective_that_one_rank_calls_alone_in_a_step_is_told(what: str) -> None:
    for outcome in run_ranks(calls_alone, 2, what, init=False, expect_failures=True, deadline_s=60):
        assert outcome.error_type == "StallError", outcome
        for words in WORDS[what]:
            assert words in outcome.error_message, (words, outcome.error_message)
        assert "raise stall_timeout" not in outcome.error_message


def works_long(rank: int, size: int) -> int:
    """Rank 0 works and sleeps in a handler, in a step and in its data, while rank 1 waits, in each way it can."""
    with distributed.process_group(timeout=120, stall_timeout=3600):
        model = distributed.prepare_model(nn.Linear(4, 1))

        def busy(engine: Engine) -> None:
            end = time.monotonic() + 6
            while rank == 0 and time.monotonic() < end:
                torch.ones(50, 50) @ torch.ones(50, 50)
            distributed.barrier("after work")

        def sleeps(engine: Engine) -> None:
            if rank == 0:
                time.sleep(6)

        def data() -> Iterator[torch.Tensor]:
            for each in range(4):
                if each == 2 and rank == 1:
                    time.sleep(6)
                yield torch.ones(2, 4)

        def step(engine: Engine, batch: torch.Tensor) -> None:
            model(batch).sum().backward()

        trainer = Engine(step)
        trainer.on(Events.ITERATION_COMPLETED(once=1), busy)
        trainer.on(Events.ITERATION_COMPLETED(once=2), sleeps)
        return trainer.run(data(), epoch_length=4).iteration


def test_a_rank_that_is_merely_slow_is_not_accused() -> None:
    assert run_ranks(works_long, 2, init=False, deadline_s=90) == [4, 4]


def answer(
    collective: str = "", waits_in: str = "", *, joined: int = 5, cpu_s: float = 1.0, **more: Any
) -> dict[str, Any]:
    return {
        "where": [],
        "site": "",
        "collective": collective,
        "waits_in": waits_in,
        "is_ahead": False,
        "joined": joined,
        "calls": 3,
        "cpu_s": cpu_s,
        "time_s": 10.0,
        **more,
    }


def later(answers: dict[int, dict[str, Any]], **changed: Any) -> dict[int, dict[str, Any]]:
    return {rank: {**each, "time_s": 13.0, **changed} for rank, each in answers.items()}


def test_only_ranks_that_stand_still_and_cannot_meet_are_taken_for_a_deadlock() -> None:
    evaluates = answer("the comparison at the start of a run, 5 numbers")
    blocked = answer(waits_in="backward()", joined=6)
    stuck = {0: evaluates, 1: blocked}
    assert is_certain(stuck, later(stuck))
    assert not is_certain({}, stuck)
    assert not is_certain(stuck, {0: later(stuck)[0], 1: {**later(stuck)[1], "cpu_s": 3.5}})  # it computes
    assert not is_certain(stuck, {0: later(stuck)[0], 1: {**later(stuck)[1], "joined": 7}})  # it goes on
    reads = {0: evaluates, 1: answer(joined=6)}  # somewhere in its data
    assert not is_certain(reads, later(reads))
    assert cause(reads, 0) is None
    waits = {0: evaluates, 1: answer(waits_in="backward()")}  # for a third rank, it may be
    assert not is_certain(waits, later(waits))
    assert cause(waits, 0) is None
    at_one_line = {rank: answer(waits_in="backward()", site="train.py:7 in step") for rank in range(2)}
    assert cause(at_one_line, 0) is None
    elsewhere = {**at_one_line, 1: answer(waits_in="a collective of torch.distributed", site="train.py:5 in step")}
    assert not is_certain(elsewhere, later(elsewhere))
    assert "different collectives" in str(cause(elsewhere, 0))
    one_of_three = {**stuck, 2: answer(joined=6)}
    assert not is_certain(one_of_three, later(one_of_three))
    together = {0: evaluates, 1: evaluates}
    assert not is_certain(together, later(together))
    ended = {0: evaluates, 1: answer("the end of process_group()")}
    assert is_certain(ended, later(ended))
    on_its_way = {0: answer("barrier('x')", calls=2), 1: answer("the end of process_group()")}
    assert not is_certain(on_its_way, later(on_its_way))
