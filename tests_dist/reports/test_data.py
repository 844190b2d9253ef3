"""Data over real ranks: orders that nobody tells, iterators that reset themselves, parts that users have cut."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankFailed, run_ranks
from torch.utils.data import DataLoader, DistributedSampler

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint
from dengine.metrics import Average

LENGTH, EPOCHS = 24, 3


class Wrapper:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader


class Resetting:
    """As DALI's iterators."""

    def __init__(self, length: int) -> None:
        self.length, self.position = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> "Resetting":
        return self

    def __next__(self) -> float:
        if self.position == self.length:
            self.position = 0
            raise StopIteration
        self.position += 1
        return float(self.position)


def wrapped(rank: int, size: int, folder: str, until: int) -> list[list[int]]:
    """The batches from the newest checkpoint on."""
    numbers: Any = torch.arange(LENGTH)
    found: list[list[int]] = []
    with distributed.process_group():
        loader = distributed.prepare_data_loader(DataLoader(numbers, shuffle=True), global_batch_size=6)
        trainer = Engine(lambda engine, batch: found.append(batch.tolist()))
        trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint({"trainer": trainer}, folder))
        Checkpoint.resume(folder, {"trainer": trainer})
        trainer.run(Wrapper(loader), max_epochs=EPOCHS, max_iterations=until)
    return found


def test_a_wrapped_loader_gives_every_sample_once_an_epoch_in_another_order_on_fewer_and_more_ranks(
    tmp_path: Path,
) -> None:
    def steps(size: int, folder: str, until: int) -> list[list[int]]:
        parts = run_ranks(wrapped, size, str(tmp_path / folder), until, init=False)
        return [sorted(sum(step, [])) for step in zip(*parts, strict=True)]

    whole = steps(1, "whole", EPOCHS * 4)
    epochs = [whole[first : first + 4] for first in range(0, EPOCHS * 4, 4)]
    assert all(sorted(sum(epoch, [])) == list(range(LENGTH)) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == EPOCHS
    assert steps(2, "parts", 5) + steps(3, "parts", EPOCHS * 4) == whole


def reset(rank: int, size: int, lengths: list[int]) -> list[Any]:
    """The means of evaluations, and how many steps a joined engine took in each of three epochs."""
    data, found = Resetting(lengths[rank]), []
    with distributed.process_group():
        for _ in range(3):
            evaluator = Engine(lambda engine, batch: batch)
            evaluator.add_metric(Average(), "mean")
            found.append(float(evaluator.run(data).metrics["mean"]))
        steps: list[int] = []
        trainer = Engine(lambda engine, batch: None, joined=True)
        trainer.on(Events.EPOCH_COMPLETED, lambda engine: steps.append(engine.state.epoch_iteration))
        trainer.run(Resetting(lengths[rank]), max_epochs=3)
        return [*found, *steps]


def test_each_evaluation_over_iterators_that_reset_themselves_is_whole_on_every_rank() -> None:
    mean = (1 + 2 + 3 + 1 + 2) / 5
    assert run_ranks(reset, 2, [3, 2], init=False) == [[mean, mean, mean, 3, 3, 3]] * 2


def cut_by_hand(rank: int, size: int, folder: str, lengths: list[int]) -> int:
    with distributed.process_group():
        trainer = Engine(lambda engine, batch: None)
        trainer.on(Events.ITERATION_COMPLETED(once=1), Checkpoint({"trainer": trainer}, folder))
        Checkpoint.resume(folder, {"trainer": trainer})
        return trainer.run(list(range(lengths[rank]))).iteration


def test_each_rank_s_own_part_is_compared_with_what_that_rank_had(tmp_path: Path) -> None:
    assert run_ranks(cut_by_hand, 2, str(tmp_path), [3, 2], init=False) == [3, 2]
    assert run_ranks(cut_by_hand, 2, str(tmp_path), [3, 2], init=False) == [3, 2]
    with pytest.raises(RankFailed) as raised:
        run_ranks(cut_by_hand, 2, str(tmp_path), [4, 3], init=False)
    errors = {message for name, message, _ in raised.value.failures.values() if name == "ValueError"}
    assert any("was 3 and is 4" in error or "was 2 and is 3" in error for error in errors)


def misfitting(rank: int, size: int) -> list[str]:
    numbers: Any = list(range(8))
    messages = []
    with distributed.process_group():
        for sampler in (
            DistributedSampler(numbers, num_replicas=4, rank=rank),
            distributed.ElasticSampler(numbers, num_replicas=size, rank=1 - rank),
        ):
            try:
                distributed.prepare_data_loader(DataLoader(numbers, sampler=sampler))
            except ValueError as error:
                messages.append(str(error).partition(",")[0].partition(" for ")[2])
        kept = DistributedSampler(numbers, num_replicas=size, rank=rank, seed=5)
        prepared = distributed.prepare_data_loader(DataLoader(numbers, sampler=kept))
        assert [int(batch) for batch in prepared] == list(kept), "not the user's order"
    return messages


def test_a_sampler_that_is_not_this_rank_s_is_refused_on_every_rank() -> None:
    assert run_ranks(misfitting, 2, init=False) == [
        ["rank 0 of 4", "rank 1 of 2"],
        ["rank 1 of 4", "rank 0 of 2"],
    ]
