"""Ranks that begin with the same batch although each should have its own: a warning that names two, and no other."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from ranks import run_ranks
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

from dengine import Engine
from dengine.data import zip_loaders
from dengine.distributed import prepare_data_loader, world

NUMBERS = torch.arange(400.0).reshape(100, 4)


class Batches(BatchSampler):
    """Of this rank (`part`), which the loader takes as it is."""

    def __init__(self, part: int, num_parts: int) -> None:
        self.part, self.num_parts = part, num_parts

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(start + self.part, start + 24, self.num_parts)) for start in (0, 24, 48)])

    def __len__(self) -> int:
        return 3


class Stream(IterableDataset[Any]):
    """Says that it gives each rank its own samples."""

    def __init__(self, samples: torch.Tensor, part: int, num_parts: int) -> None:
        self.samples, self.part, self.num_parts = samples, part, num_parts
        self.shards_itself = True

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples[self.part :: self.num_parts])


class Sized(Stream):
    def __len__(self) -> int:
        return len(range(self.part, len(self.samples), self.num_parts))


def cases(rank: int, size: int) -> dict[str, Any]:
    """For each kind of data, whether it warns."""
    own, same, two = (rank, size), (0, 1), (min(rank, 1), 2)  # two: of three ranks the last two have the same

    def sampled(part: tuple[int, int]) -> Any:
        return DataLoader(TensorDataset(NUMBERS), batch_sampler=Batches(*part))

    def stream(samples: torch.Tensor, part: tuple[int, int], batch_size: int = 5, kind: Any = Stream) -> Any:
        return prepare_data_loader(DataLoader(kind(samples, *part), batch_size=batch_size))

    return {
        "own sampler, same": sampled(same),
        "own sampler, two": sampled(two),
        "own sampler, own": sampled(own),
        "stream, same": stream(NUMBERS, same),
        "stream, two": stream(NUMBERS, two),
        "stream, own": stream(NUMBERS, own),
        "stream with a length, same": stream(NUMBERS, same, kind=Sized),
        "bare stream, same": Stream(torch.arange(10_000.0).reshape(100, 100), *same),
        "zipped, same": zip_loaders(a=prepare_data_loader(DataLoader(TensorDataset(NUMBERS))), b=stream(NUMBERS, same)),
        "zipped, own": zip_loaders(a=prepare_data_loader(DataLoader(TensorDataset(NUMBERS))), b=stream(NUMBERS, own)),
        "constant": stream(torch.zeros(100, 40), own),
        "of a few values": stream(torch.arange(100) % 7, same),
        "single samples": stream(NUMBERS, same, batch_size=1),
        "single long samples": stream(torch.arange(10_000.0).reshape(100, 100), same, batch_size=1),
        "prepared": prepare_data_loader(DataLoader(TensorDataset(torch.zeros(100, 40) + torch.arange(40)), 5)),
        "a list": [NUMBERS] * 5,
    }


def shards(rank: int, size: int) -> dict[str, list[float]]:
    """This rank's samples, by who is said to shard."""
    samples, numbers = torch.arange(12.0), TensorDataset(torch.arange(12.0))
    silent = Stream(samples, rank, size)
    silent.shards_itself = False
    sampler: Any = DistributedSampler(numbers, shuffle=False, num_replicas=size, rank=rank)
    mine: Any = BatchSampler(range(rank, 12, size), 2, False)
    loaders: dict[str, DataLoader[Any]] = {
        "a stream that says it, cut": prepare_data_loader(DataLoader(Stream(samples, 0, 1), 2), shard="rank"),
        "a stream, left": prepare_data_loader(DataLoader(silent, 2), shard="self"),
        "a sampler that fits, left": prepare_data_loader(DataLoader(numbers, 2, sampler=sampler)),
        "a sampler that fits, cut": prepare_data_loader(DataLoader(numbers, 2, sampler=sampler), shard="rank"),
        "batches of one's own, left": prepare_data_loader(DataLoader(numbers, batch_sampler=mine), shard="self"),
    }
    return {
        name: [float(each) for batch in loader for each in (batch[0] if isinstance(batch, list) else batch)]
        for name, loader in loaders.items()
    }


def warned(rank: int, size: int) -> tuple[dict[str, list[str]], list[str]]:
    found = {}
    for name, data in cases(rank, size).items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Engine(lambda engine, batch: None).run(data, max_epochs=1)
        found[name] = [str(each.message) for each in caught if "same first batch" in str(each.message)]
    again = cases(rank, size)["own sampler, same"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            Engine(lambda engine, batch: None).run(again, max_epochs=2)
    assert world().size == size, "the group is still there"
    return found, [str(each.message) for each in caught if "same first batch" in str(each.message)]


def test_ranks_with_the_same_first_batch_are_named_and_nothing_else_warns() -> None:
    found = run_ranks(warned, 3, deadline_s=120)
    assert not any(any(of_case) for of_case in found[1][0].values())
    by_case, again = found[0]
    pairs = {
        "own sampler, same": "Rank 0 and rank 1",
        "own sampler, two": "Rank 1 and rank 2",
        "stream, same": "Rank 0 and rank 1",
        "stream, two": "Rank 1 and rank 2",
        "stream with a length, same": "Rank 0 and rank 1",
        "bare stream, same": "Rank 0 and rank 1",
        "zipped, same": "Rank 0 and rank 1",
        "single long samples": "Rank 0 and rank 1",
    }
    assert {name for name, texts in by_case.items() if texts} == set(pairs)
    for name, pair in pairs.items():
        assert len(by_case[name]) == 1
        assert by_case[name][0].startswith(f"{pair} were given the same first batch by this ")
    assert len(again) == 1


def test_who_shards_can_be_said() -> None:
    found = run_ranks(shards, 2, deadline_s=120)
    strided, turns = [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]], [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    for name, expected in {
        "a stream that says it, cut": turns,
        "a stream, left": strided,
        "a sampler that fits, left": strided,
        "a sampler that fits, cut": turns,
        "batches of one's own, left": strided,
    }.items():
        assert [of_rank[name] for of_rank in found] == expected, name
