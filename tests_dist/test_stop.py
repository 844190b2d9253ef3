"""`terminate()` on one rank, and every rank leaves at the same iteration: nobody waits for who has left."""

import time
from typing import Any

import pytest
from ranks import run_ranks

from dengine import Engine, Events, distributed
from dengine.control import stop as runs
from dengine.control.run import END
from dengine.control.run import position as place
from dengine.control.stop import SharedRun
from dengine.metrics import Average


def position(engine: Engine) -> tuple[int, int, int]:
    state = engine.state
    return state.epoch, state.epoch_iteration, state.iteration


def trained(
    rank: int, size: int, event: str, count: int, who: list[int], scope: str, waits: bool
) -> tuple[tuple[int, int, int], list[str]]:
    """Two epochs of 50; ranks `who` ask to stop at `event`. With `waits`, a step waits for all ranks, as in DDP."""
    log: list[str] = []
    with distributed.process_group(timeout=300):

        def step(engine: Engine, batch: int) -> float:
            if waits:
                return distributed.all_reduce(float(batch))
            time.sleep(0.0005 * (1 + rank))
            return float(batch)

        trainer = Engine(step)
        trainer.add_metric(Average(), "mean")
        for name in Events:
            if "ITERATION" not in name.name and "BATCH" not in name.name:
                trainer.on(name, lambda engine, name=name: log.append(name.name))
        if rank in who:
            ask = trainer.terminate if scope == "run" else trainer.terminate_epoch
            trainer.on(Events[event](once=count), lambda engine: ask())
        trainer.run(range(50), max_epochs=2)
        return position(trainer), log


ONE_EPOCH = ["STARTED", "EPOCH_STARTED", "EPOCH_COMPLETED"]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("who", [[0], [2], [0, 1, 2]])
@pytest.mark.parametrize("event", ["ITERATION_STARTED", "ITERATION_COMPLETED", "GET_BATCH_COMPLETED"])
def test_all_ranks_leave_the_run_at_the_same_iteration(event: str, who: list[int], waits: bool) -> None:
    found = run_ranks(trained, 3, event, 10, who, "run", waits, init=False, deadline_s=40)
    assert len({place for place, _ in found}) == 1, found
    (epoch, _, iteration), _ = found[0]
    assert epoch == 0
    assert 10 <= iteration <= (13 if waits else 50)
    assert [each for _, each in found] == [
        ["STARTED", "EPOCH_STARTED", "TERMINATED", "COMPLETED"]
    ] * 3 or iteration == 50


@pytest.mark.parametrize("who", [[1], [0, 2]])
def test_all_ranks_leave_the_epoch_at_the_same_iteration_and_complete_it(who: list[int]) -> None:
    found = run_ranks(trained, 3, "ITERATION_COMPLETED", 10, who, "epoch", True, init=False, deadline_s=40)
    assert len({place for place, _ in found}) == 1, found
    (epoch, epoch_iteration, iteration), log = found[0]
    assert (epoch, epoch_iteration) == (1, 50)
    assert 60 <= iteration <= 63
    assert log == ["STARTED", *2 * ["EPOCH_STARTED", "EPOCH_COMPLETED"], "COMPLETED"]


@pytest.mark.parametrize("who", [[1], [0, 1, 2]])
def test_a_stop_asked_for_at_the_end_of_an_epoch_comes_before_or_within_the_next(who: list[int]) -> None:
    found = run_ranks(trained, 3, "EPOCH_COMPLETED", 1, who, "run", True, init=False, deadline_s=40)
    assert len({place for place, _ in found}) == 1, found
    assert found[0][0][2] <= 53
    assert all(log[:3] == ONE_EPOCH and log[-2:] == ["TERMINATED", "COMPLETED"] for _, log in found)


@pytest.mark.parametrize("event", ["STARTED", "EPOCH_STARTED"])
def test_a_stop_asked_for_before_the_first_iteration_is_heard(event: str) -> None:
    found = run_ranks(trained, 3, event, 1, [1], "run", True, init=False, deadline_s=40)
    assert len({place for place, _ in found}) == 1, found
    assert found[0][0][2] <= 3
    assert all(log[-2:] == ["TERMINATED", "COMPLETED"] for _, log in found)


def on_uneven_shards(rank: int, size: int, lengths: list[int], who: int, at: int) -> tuple[int, int, float, bool]:
    """Shards differ in length; the ranks meet at the epoch's end only, in the reduction of the metric."""
    with distributed.process_group(timeout=300):
        evaluator = Engine(lambda engine, batch: time.sleep(0.001) or float(rank))
        evaluator.add_metric(Average(), "mean")
        stop = evaluator.on(
            Events.ITERATION_COMPLETED(once=at), lambda engine: engine.terminate() if rank == who else None
        )
        evaluator.run(range(lengths[rank]), max_epochs=2)
        first = evaluator.state.epochs_completed
        stop.remove()  # it would come again, and whether the epoch is over by then is a matter of moments
        # The next run is a whole one, on all ranks.
        state = evaluator.run(range(lengths[rank]))
        return first, state.iteration, float(state.metrics["mean"]), distributed.all_reduce(1.0) == size


@pytest.mark.parametrize(("lengths", "who", "at"), [([5, 200, 200], 1, 50), ([200, 0, 3], 0, 20), ([0, 4, 0], 1, 4)])
def test_ranks_of_uneven_shards_agree_whether_the_epoch_is_completed(lengths: list[int], who: int, at: int) -> None:
    found = run_ranks(on_uneven_shards, 3, lengths, who, at, init=False, deadline_s=40)
    assert len({first for first, *_ in found}) == 1, found
    mean = sum(rank * length for rank, length in enumerate(lengths)) / sum(lengths)
    for rank, (_, iterations, value, together) in enumerate(found):
        assert iterations == lengths[rank]
        assert value == pytest.approx(mean)
        assert together


def at_random(rank: int, size: int, seed: int) -> list[tuple[int, int, int]]:
    """Many runs, one after the other, each stopped by a rank and at a moment of its own."""
    import random

    shared, mine = random.Random(seed), random.Random(seed * 100 + rank)
    places = []
    with distributed.process_group(timeout=300):
        for _ in range(40):
            who, moment, waits = shared.randrange(size), shared.randrange(30), shared.random() < 0.5

            def step(engine: Engine, batch: int, who: int = who, moment: int = moment, waits: bool = waits) -> Any:
                if rank == who and engine.state.iteration == moment:
                    engine.terminate()
                time.sleep(mine.random() * 0.0005)
                return distributed.all_reduce(1.0) if waits else 1.0

            trainer = Engine(step)
            trainer.add_metric(Average(), "one")
            trainer.run(range(10), max_epochs=3)
            places.append(position(trainer))
    return places


@pytest.mark.parametrize("seed", range(4))
def test_stops_at_random_moments_never_part_the_ranks(seed: int) -> None:
    found = run_ranks(at_random, 3, seed, init=False, deadline_s=60)
    assert found[0] == found[1] == found[2]


def nested(rank: int, size: int) -> tuple[int, int]:
    """The evaluator, inside the trainer's handler, stops the trainer: on one rank only."""
    with distributed.process_group(timeout=300):
        trainer = Engine(lambda engine, batch: distributed.all_reduce(1.0))
        evaluator = Engine(lambda engine, batch: 1.0)
        evaluator.add_metric(Average(), "one")
        if rank == 1:
            evaluator.on(Events.COMPLETED(filter=lambda e, c: trainer.state.epoch == 1), lambda e: trainer.terminate())
        trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1, 2]) and None)
        trainer.run(range(5), max_epochs=20)
        return trainer.state.iteration, evaluator.state.iteration


def test_an_evaluator_stops_its_trainer_on_all_ranks() -> None:
    found = run_ranks(nested, 3, init=False, deadline_s=40)
    assert len(set(found)) == 1
    assert 10 <= found[0][0] <= 13


def asked_whether_any_rank_has_a_batch(rank: int, size: int) -> list[int]:
    begun: list[int] = []

    class Noted(SharedRun):
        def has_any_rank_batches(self, epoch: int) -> bool:
            begun.append(self.started)
            return super().has_any_rank_batches(epoch)

    with distributed.process_group(timeout=300):
        runs.SharedRun = Noted
        Engine(lambda engine, batch: batch).run([1.0] * (4 if rank == 1 else 0))
        return begun


def test_a_rank_without_a_batch_has_begun_the_epochs_end_so_that_a_stop_in_the_last_batch_completes_it() -> None:
    at_the_end = place(0, END)
    assert run_ranks(asked_whether_any_rank_has_a_batch, 3, init=False) == [[at_the_end], [], [at_the_end]]
