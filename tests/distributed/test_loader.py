"""What of a loader is kept, and how an error reads. Shards of several ranks are judged in tests_dist."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

from dengine.data.loader import data_state
from dengine.data.seeding import SeededDataset
from dengine.data.stream import StreamShard
from dengine.distributed import ElasticSampler, World, prepare_data_loader

NUMBERS = TensorDataset(torch.arange(10))


class Stream(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = -1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def doubled(samples: list[Any]) -> torch.Tensor:
    return 2 * torch.stack([sample[0] for sample in samples])


def test_the_settings_of_the_loader_are_kept() -> None:
    generator = torch.Generator()
    loader = DataLoader(
        NUMBERS, batch_size=3, shuffle=True, collate_fn=doubled, drop_last=True, timeout=0, generator=generator
    )
    prepared = prepare_data_loader(loader)
    assert prepared.batch_size == 3
    assert prepared.drop_last
    assert prepared.generator is generator
    assert isinstance(prepared.sampler, ElasticSampler)
    assert prepared.sampler.shuffle
    assert len(prepared) == 3
    assert all(int(batch.max()) % 2 == 0 for batch in prepared)


def test_workers_are_kept_and_iterate_over_the_same_samples() -> None:
    loader = DataLoader(NUMBERS, batch_size=4, num_workers=1, prefetch_factor=3, persistent_workers=True)
    prepared = prepare_data_loader(loader)
    assert (prepared.num_workers, prepared.prefetch_factor, prepared.persistent_workers) == (1, 3, True)
    assert torch.cat([batch[0] for batch in prepared]).tolist() == list(range(10))


@pytest.mark.parametrize("shuffle", [True, False])
def test_shuffling_is_that_of_the_loaders_own_sampler(shuffle: bool) -> None:
    prepared = prepare_data_loader(DataLoader(NUMBERS, shuffle=shuffle))
    order = [int(batch[0]) for batch in prepared]
    assert sorted(order) == list(range(10))
    assert (order == list(range(10))) is not shuffle
    sharded = DistributedSampler(NUMBERS, num_replicas=1, rank=0, shuffle=shuffle)
    assert prepare_data_loader(DataLoader(NUMBERS, sampler=sharded)).sampler.shuffle is shuffle  # type: ignore[attr-defined]


def test_a_prepared_loader_can_be_prepared_again() -> None:
    prepared = prepare_data_loader(prepare_data_loader(DataLoader(NUMBERS, batch_size=2), exact=True), exact=True)
    assert len(prepared) == 5
    again = prepare_data_loader(prepare_data_loader(DataLoader(Custom())), seed=4)
    assert isinstance(again.dataset, SeededDataset)
    assert isinstance(again.dataset._dataset, Custom)


def test_a_prepared_stream_can_be_prepared_again_and_is_not_sharded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dengine.data.loader.world", lambda: World(rank=1, size=2))
    once = prepare_data_loader(DataLoader(Stream(8), batch_size=2))
    assert [batch.tolist() for batch in prepare_data_loader(once)] == [batch.tolist() for batch in once]


def test_a_loader_gets_a_generator_of_its_own_that_differs_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def seed_of(rank: int) -> int:
        monkeypatch.setattr("dengine.data.loader.world", lambda: World(rank=rank, size=2))
        generator = prepare_data_loader(DataLoader(NUMBERS)).generator
        assert generator is not None
        return int(generator.initial_seed())

    assert seed_of(0) != seed_of(1) != torch.default_generator.initial_seed()


def test_the_state_of_the_data_is_found_on_a_loader() -> None:
    prepared = prepare_data_loader(DataLoader(NUMBERS, batch_size=3, shuffle=True), seed=2)
    assert data_state(prepared) == prepared.sampler.state()  # type: ignore[attr-defined]
    assert data_state(prepare_data_loader(DataLoader(Stream(4), batch_size=2), exact=True, seed=2)) == {
        "length": None,
        "global_batch_size": 2,
        "seed": 2,
        "shuffle": None,
        "exact": True,
        "drop_last": False,
    }
    assert data_state(DataLoader(NUMBERS)) is None
    assert data_state([1, 2]) is None


def test_a_loader_without_batches_stays_one() -> None:
    prepared = prepare_data_loader(DataLoader(NUMBERS, batch_size=None))
    assert [int(sample[0]) for sample in prepared] == list(range(10))


class Custom(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        ([1, 2], {}, TypeError, "takes a DataLoader, but got a list"),
        (DataLoader(NUMBERS, batch_size=2, drop_last=True), {"exact": True}, ValueError, "build it without"),
        (DataLoader(NUMBERS, batch_size=None), {"global_batch_size": 4}, ValueError, "has batch_size=None"),
        (DataLoader(NUMBERS), {"global_batch_size": 0}, ValueError, "global_batch_size=0 must be at least 1"),
    ],
)
def test_what_cannot_be_sharded_says_what_to_do(
    loader: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        prepare_data_loader(loader, **options)


def test_an_indivisible_global_batch_names_the_nearest_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dengine.data.loader.world", lambda: World(rank=0, size=3))
    with pytest.raises(ValueError, match="global_batch_size=10 does not divide into 3 ranks.*: 9 and 12"):
        prepare_data_loader(DataLoader(NUMBERS), global_batch_size=10)
    with pytest.raises(ValueError, match="nearest sizes that do: 3"):
        prepare_data_loader(DataLoader(NUMBERS), global_batch_size=1)
    assert prepare_data_loader(DataLoader(NUMBERS), global_batch_size=12).batch_size == 4


def stream_shards(
    size: int, num_ranks: int, batch_size: int, *, exact: bool, drop_last: bool = False
) -> list[list[int]]:
    return [
        list(StreamShard(Stream(size), batch_size, World(rank=rank, size=num_ranks), exact, drop_last))
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 6, 7, 11, 12, 13])
def test_a_stream_is_dealt_out_by_batch(size: int, num_ranks: int) -> None:
    exact = stream_shards(size, num_ranks, 2, exact=True)
    assert sorted(sum(exact, [])) == list(range(size))
    padded = stream_shards(size, num_ranks, 2, exact=False)
    assert len({-(-len(shard) // 2) for shard in padded}) == 1  # the same number of steps
    assert set(sum(padded, [])) == set(range(size))
    dropped = stream_shards(size, num_ranks, 2, exact=False, drop_last=True)
    assert [len(shard) for shard in dropped] == [size // (2 * num_ranks) * 2] * num_ranks


def test_a_stream_through_a_loader_keeps_its_order_and_hears_of_the_epoch() -> None:
    stream = Stream(7)
    prepared = prepare_data_loader(DataLoader(stream, batch_size=2), exact=True)
    assert torch.cat(list(prepared)).tolist() == list(range(7))
    prepared.dataset.set_epoch(4)  # type: ignore[attr-defined]
    assert stream.epoch == 4


def test_who_shards_is_said_by_one_of_three_words() -> None:
    loader = DataLoader(NUMBERS, batch_size=2)
    assert prepare_data_loader(loader, shard="self") is loader
    with pytest.raises(ValueError, match="shard='auto ' must be 'auto', 'rank' or 'self'"):
        prepare_data_loader(loader, shard="auto ")  # type: ignore[arg-type]
    for options in ({"exact": True}, {"global_batch_size": 2}):
        with pytest.raises(ValueError, match="exact= and global_batch_size= would be overlooked"):
            prepare_data_loader(loader, shard="self", **options)
