"""A run continued by another number of ranks and workers: the same global batches of the same augmented samples."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint

GLOBAL_BATCH = 12  # the least that 2, 3 and 4 ranks divide
LENGTH = 53  # four global batches, and five samples that do not divide by 2, 3 or 4 ranks
EPOCHS = 2

Sample = tuple[int, float, float, float]
Batches = list[list[Sample]]


def sample(index: int) -> Sample:
    """Draws more than once for some, so that a generator carried from one to the next would show."""
    for _ in range(index % 3):
        random.random(), np.random.rand(), torch.rand(())
    return index, random.random(), float(np.random.rand()), torch.rand(()).item()


class Augmented(Dataset[Sample]):
    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return sample(index)


class Stream(IterableDataset[Sample]):
    """Shuffles at random too."""

    def __iter__(self) -> Iterator[Sample]:
        yield from map(sample, np.random.permutation(LENGTH).tolist())


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def loader_of(kind: str, num_workers: int, global_batch: int, length: int = LENGTH, seed: int = 7) -> DataLoader[Any]:
    is_stream = kind == "stream"
    loader: DataLoader[Any] = DataLoader(
        Stream() if is_stream else Augmented(length),
        shuffle=None if is_stream else True,
        collate_fn=as_list,
        num_workers=min(num_workers, 1) if is_stream else num_workers,  # each worker would read all of it
        persistent_workers=num_workers > 0,
        drop_last=kind == "drop_last",
    )
    return distributed.prepare_data_loader(loader, exact=kind == "exact", global_batch_size=global_batch, seed=seed)


def part(
    rank: int, size: int, folder: str, max_iterations: int, kind: str, num_workers: int, changed: dict[str, Any]
) -> Batches:
    """This rank's batches from the newest checkpoint up to `max_iterations`, where another one is saved."""
    options = {"global_batch": GLOBAL_BATCH, **changed}
    is_wanted = options.pop("is_wanted", False)
    batches: Batches = []
    trainer = Engine(lambda engine, batch: batches.append(batch))
    trainer.on(Events.ITERATION_COMPLETED(once=max_iterations), Checkpoint({"trainer": trainer}, folder))
    Checkpoint.resume(folder, {"trainer": trainer})
    loader = loader_of(kind, num_workers, **options)
    trainer.run(loader, max_epochs=EPOCHS, max_iterations=max_iterations, allow_changed_data=is_wanted)
    return batches


def global_batches(parts: list[Batches]) -> Batches:
    num_steps = max(map(len, parts))
    steps = [[batches[step] for batches in parts if step < len(batches)] for step in range(num_steps)]
    return [sorted(sum(step, [])) for step in steps]


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [
        ("exact", (1, 3, 4)),
        ("exact", (4, 6, 9)),
        ("padded", (2, 5, 7)),
        ("drop_last", (3, 4, 6)),
        ("stream", (1, 4, 7)),
    ],
)
def test_four_two_three_and_one_rank_see_the_global_batches_of_one(
    tmp_path: Path, kind: str, cuts: tuple[int, int, int]
) -> None:
    # The oracle: this process alone, without workers, never interrupted.
    per_epoch = 4 if kind == "drop_last" else 5
    end = EPOCHS * per_epoch
    expected = global_batches([part(0, 1, str(tmp_path / "whole"), end, kind, 0, {})])
    assert len(expected) == end
    found: Batches = []
    for size, num_workers, stop in zip((4, 2, 3, 1), (0, 1, 2, 1), (*cuts, end), strict=True):
        parts = run_ranks(part, size, str(tmp_path / "parts"), stop, kind, num_workers, {}, deadline_s=120)
        found += global_batches(parts)
    if kind in ("padded", "stream"):  # the last step has some twice, so that all ranks take the same number of steps
        for last in (per_epoch - 1, end - 1):
            found[last] = sorted(set(found[last]) & set(expected[last]))
    assert found == expected
    for epoch in (found[:per_epoch], found[per_epoch:]):
        seen = sorted(sample[0] for batch in epoch for sample in batch)
        assert seen == list(range(LENGTH)) if kind != "drop_last" else len(set(seen)) == len(seen) == 48
    numbers = [number for batch in found for sample in batch for number in sample[1:]]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("saved_at", [2, 5])  # in an epoch, and at the end of one
@pytest.mark.parametrize(
    ("changed", "size", "message"),
    [
        ({"global_batch": 15}, 3, "the global batch was 12 and is 15: pass global_batch_size=12"),
        ({"length": 54}, 2, "the number of samples was 53 and is 54"),
        ({"seed": 8}, 1, "the seed of the order was 7 and is 8: pass seed=7"),
    ],
)
def test_changed_data_is_refused_with_both_values_unless_that_is_wanted(
    tmp_path: Path, saved_at: int, changed: dict[str, Any], size: int, message: str
) -> None:
    part(0, 1, str(tmp_path), saved_at, "exact", 0, {})
    with pytest.raises(RankFailed, match=re.escape(message)):
        run_ranks(part, size, str(tmp_path), 7, "exact", 0, changed)
    parts = run_ranks(part, size, str(tmp_path), 7, "exact", 0, {**changed, "is_wanted": True})
    assert {len(batches) for batches in parts} == {7 - saved_at}


@pytest.mark.parametrize(
    ("size", "global_batch", "message"),
    [
        (5, 12, "global_batch_size=12 does not divide into 5 ranks; the nearest sizes that do: 10 and 15."),
        (3, 16, "global_batch_size=16 does not divide into 3 ranks; the nearest sizes that do: 15 and 18."),
        (3, 2, "global_batch_size=2 does not divide into 3 ranks; the nearest sizes that do: 3."),
    ],
)
def test_a_global_batch_that_does_not_divide_names_the_nearest(
    tmp_path: Path, size: int, global_batch: int, message: str
) -> None:
    with pytest.raises(RankFailed, match=re.escape(message)):
        run_ranks(part, size, str(tmp_path), 1, "exact", 0, {"global_batch": global_batch})
