"""Engines whose ranks have data of different length: with joined=True all take the same number of iterations."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils.data import DataLoader

from dengine import Engine, Events, distributed
from dengine.engine import Absent
from dengine.metrics import Average

DATA = [[1.0, 2.0, 3.0], [10.0], []]


def trace(rank: int, size: int, options: dict[str, Any]) -> tuple[list[Any], float, int | None]:
    """What each iteration gets, the metric, and the length of the epoch. Each step takes a collective."""
    seen: list[Any] = []

    def step(engine: Engine, batch: Any) -> float:
        is_absent = isinstance(batch, Absent)
        seen.append(("spare", batch.spare) if is_absent else batch)
        dist.all_reduce(torch.zeros(1))
        return float(batch.spare if is_absent else batch)

    engine = Engine(step, joined=True)
    engine.add_metric(Average(), "mean")
    state = engine.run(DATA[rank], **options)
    return seen, state.metrics["mean"], state.epoch_length  # type: ignore[return-value]


def test_ranks_take_part_until_the_longest_shard_ends_and_metrics_count_what_is_theirs() -> None:
    spare = ("spare", 1.0)  # the first batch of the first rank that has one
    assert run_ranks(trace, 3, {}) == [
        ([1.0, 2.0, 3.0], 4.0, 3),
        ([10.0, spare, spare], 4.0, 3),
        ([spare] * 3, 4.0, 3),
    ]
    assert run_ranks(trace, 2, {})[1][0] == [10.0, ("spare", 10.0), ("spare", 10.0)]


def test_an_epoch_longer_than_the_data_passes_over_all_shards_together() -> None:
    found = run_ranks(trace, 2, {"epoch_length": 4})
    assert found == [([1.0, 2.0, 3.0, 1.0], 27 / 6, 4), ([10.0, ("spare", 10.0), ("spare", 10.0), 10.0], 27 / 6, 4)]


def resumed(rank: int, size: int, at: int, prepared: bool) -> tuple[list[Any], list[Any]]:
    """The batches from iteration `at + 1` on, of a run that was never interrupted and of one resumed there."""
    data: Any = DATA[rank]
    if prepared:
        loader = DataLoader(torch.arange(7.0), batch_size=2, shuffle=True)  # type: ignore[arg-type]
        data = distributed.prepare_data_loader(loader, exact=True)
    traces: list[list[Any]] = []

    def step(engine: Engine, batch: Any) -> None:
        # What is spare may be another one.
        traces[-1].append("spare" if isinstance(batch, Absent) else torch.as_tensor(batch).tolist())
        dist.all_reduce(torch.zeros(1))

    first, second = Engine(step, joined=True), Engine(step, joined=True)
    positions: list[dict[str, Any]] = []
    first.on(Events.ITERATION_COMPLETED(once=at), lambda engine: positions.append(engine.state_dict()))
    traces.append([])
    first.run(data, max_epochs=2)
    second.load_state_dict(positions[0])
    traces.append([])
    second.run(data, max_epochs=2)
    return traces[0][at:], traces[1]


@pytest.mark.parametrize(("at", "prepared"), [(1, False), (2, False), (4, False), (1, True), (3, True)])
def test_a_run_is_resumed_behind_the_end_of_its_own_data_too(at: int, prepared: bool) -> None:
    for expected, found in run_ranks(resumed, 3, at, prepared):
        assert expected
        assert found == expected


def unjoined(rank: int, size: int) -> tuple[int, int]:
    """Data that tells no length, on one rank, is not joined."""

    class Unsized:
        def __iter__(self) -> Any:
            return iter([1, 2])

    engine = Engine(lambda engine, batch: batch, joined=True)
    return engine.run(Unsized() if rank == 0 else [1, 2]).iteration, engine.run(iter([1, 2])).iteration


def test_data_of_unknown_length_is_not_joined() -> None:
    assert run_ranks(unjoined, 2) == [(2, 2), (2, 2)]
