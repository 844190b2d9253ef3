"""A run continued by another number of ranks and workers: the same global batches of the same augmented samples."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from torch.utils.data import DataLoader, Dataset

from dengine import Engine, Events, distributed
from dengine.distributed.loader import data_state
from dengine.distributed.sampler import check_same

GLOBAL_BATCH = 12
LENGTH = 53  # four global batches, and five samples that do not divide by 2, 3 or 4 ranks
PER_EPOCH = 5

Sample = tuple[int, float, float, float]
Taken = tuple[list[list[Sample]], list[dict[str, Any]], dict[str, Any]]


class Augmented(Dataset[Sample]):
    """Draws more than once for some samples, so that a generator carried from one to the next would show."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Sample:
        for _ in range(index % 3):
            random.random(), np.random.rand(), torch.rand(())
        return index, random.random(), float(np.random.rand()), torch.rand(()).item()


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def loader_of(num_workers: int, global_batch: int) -> DataLoader[Any]:
    loader = DataLoader(
        Augmented(), shuffle=True, collate_fn=as_list, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    return distributed.prepare_data_loader(loader, exact=True, global_batch_size=global_batch, seed=7)


def part(
    rank: int, size: int, position: dict[str, Any] | None, max_iterations: int, num_workers: int, saved: Any
) -> Taken:
    """Iterations from `position` up to `max_iterations`: this rank's batches, and the engine's state after each."""
    loader = loader_of(num_workers, GLOBAL_BATCH)
    current = data_state(loader)
    assert current is not None
    check_same(saved or current, current)
    batches: list[list[Sample]] = []
    states: list[dict[str, Any]] = []
    trainer = Engine(lambda engine, batch: batches.append(batch))
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: states.append(engine.state_dict()))
    if position is not None:
        trainer.load_state_dict(position)
    trainer.run(loader, max_epochs=2, max_iterations=max_iterations)
    return batches, states, current


def global_batches(parts: list[Taken]) -> list[list[Sample]]:
    num_steps = max(len(batches) for batches, _, _ in parts)
    steps = [[batches[step] for batches, _, _ in parts if step < len(batches)] for step in range(num_steps)]
    return [sorted(sum(step, [])) for step in steps]


@pytest.mark.parametrize("cuts", [(1, 3, 4), (4, 6, 9)])
def test_four_two_three_and_one_rank_see_the_global_batches_of_one(cuts: tuple[int, int, int]) -> None:
    # The oracle: this process alone, without workers, never interrupted.
    expected = global_batches([part(0, 1, None, 2 * PER_EPOCH, 0, None)])
    assert len(expected) == 2 * PER_EPOCH
    found: list[list[Sample]] = []
    position, saved = None, None
    for size, num_workers, stop in zip((4, 2, 3, 1), (0, 1, 2, 1), (*cuts, 2 * PER_EPOCH), strict=True):
        parts = run_ranks(part, size, position, stop, num_workers, saved, deadline_s=120)
        found += global_batches(parts)
        position, saved = parts[0][1][-1], parts[0][2]
    assert found == expected
    for epoch in (found[:PER_EPOCH], found[PER_EPOCH:]):
        assert sorted(sample[0] for batch in epoch for sample in batch) == list(range(LENGTH))
    numbers = [number for batch in found for sample in batch for number in sample[1:]]
    assert len(set(numbers)) == 2 * 3 * LENGTH


def other_batch(rank: int, size: int, saved: dict[str, Any], global_batch: int) -> None:
    current = data_state(loader_of(0, global_batch))
    assert current is not None
    check_same(saved, current)


def test_another_global_batch_is_refused_and_one_that_does_not_divide_names_the_nearest() -> None:
    ((_, _, saved),) = run_ranks(part, 1, None, 1, 0, None)
    with pytest.raises(RankFailed, match=re.escape("the global batch was 12 and is 15: pass global_batch_size=12")):
        run_ranks(other_batch, 3, saved, 15)
    with pytest.raises(RankFailed, match="global_batch_size=12 does not divide into 5 ranks.*: 10 and 15"):
        run_ranks(other_batch, 5, saved, 12)
