"""Every sample where it belongs, whatever the number of ranks; judged by counting."""

import re
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from dengine.data.permutation import Permutation
from dengine.data.sampler import changed_order, refuse_changes
from dengine.distributed import ElasticSampler

SIZES = st.integers(0, 60)


def shards(size: int, num_ranks: int, batch_size: int, **options: object) -> list[list[int]]:
    return [
        list(ElasticSampler(range(size), batch_size=batch_size, num_replicas=num_ranks, rank=rank, **options))  # type: ignore[arg-type]
        for rank in range(num_ranks)
    ]


@given(SIZES, st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_exact_shards_hold_every_sample_once_and_differ_by_one(
    size: int, num_ranks: int, batch_size: int, shuffle: bool
) -> None:
    found = shards(size, num_ranks, batch_size, shuffle=shuffle, exact=True)
    assert sorted(sum(found, [])) == list(range(size))
    lengths = [len(shard) for shard in found]
    assert max(lengths) - min(lengths) <= 1


@given(SIZES, st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_training_shards_are_equally_long_and_miss_no_sample(
    size: int, num_ranks: int, batch_size: int, shuffle: bool
) -> None:
    found = shards(size, num_ranks, batch_size, shuffle=shuffle)
    assert len({len(shard) for shard in found}) == 1
    assert set(sum(found, [])) == set(range(size))
    assert sum(map(len, found)) - size < num_ranks  # padded by less than one sample a rank


@given(SIZES, st.integers(1, 6), st.integers(1, 7))
def test_drop_last_keeps_whole_global_batches_only(size: int, num_ranks: int, batch_size: int) -> None:
    found = shards(size, num_ranks, batch_size, drop_last=True)
    whole = size // (num_ranks * batch_size) * batch_size
    assert [len(shard) for shard in found] == [whole] * num_ranks
    assert len(set(sum(found, []))) == whole * num_ranks


@given(SIZES, st.integers(1, 6), st.integers(1, 7), st.booleans(), st.booleans())
def test_lengths_are_told_without_iterating(
    size: int, num_ranks: int, batch_size: int, exact: bool, drop_last: bool
) -> None:
    if exact and drop_last:
        return
    for rank, shard in enumerate(shards(size, num_ranks, batch_size, exact=exact, drop_last=drop_last)):
        sampler = ElasticSampler(
            range(size), batch_size=batch_size, num_replicas=num_ranks, rank=rank, exact=exact, drop_last=drop_last
        )
        assert len(sampler) == sampler.num_samples == len(shard)
    total = sum(map(len, shards(size, num_ranks, batch_size, exact=exact, drop_last=drop_last)))
    assert sampler.total_size == total


@pytest.mark.parametrize("size", [23, 24, 25, 100])
def test_another_number_of_ranks_sees_the_same_global_batches(size: int) -> None:
    def global_batches(num_ranks: int) -> list[list[int]]:
        batch_size = 12 // num_ranks
        found = shards(size, num_ranks, batch_size, exact=True, seed=3)
        count = -(-size // 12)
        return [
            sorted(sum((shard[i * batch_size : (i + 1) * batch_size] for shard in found), [])) for i in range(count)
        ]

    assert global_batches(1) == global_batches(2) == global_batches(3) == global_batches(4)


def test_epochs_and_seeds_differ_and_each_is_repeated() -> None:
    def order(epoch: int, seed: int = 0) -> list[int]:
        sampler = ElasticSampler(range(50), num_replicas=1, rank=0, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(0)
    assert len({tuple(order(epoch, seed)) for epoch in range(5) for seed in range(5)}) == 25


@given(SIZES, st.integers(1, 4), st.integers(1, 5), st.integers(0, 70))
def test_skipping_gives_the_rest_of_the_epoch_once(size: int, num_ranks: int, batch_size: int, skipped: int) -> None:
    sampler = ElasticSampler(range(size), batch_size=batch_size, num_replicas=num_ranks, rank=num_ranks - 1)
    whole = list(sampler)
    sampler.set_epoch(0)
    sampler.skip(skipped)
    assert list(sampler) == whole[skipped:]
    sampler.set_epoch(0)
    assert list(sampler) == whole
    sampler.skip(skipped)
    sampler.set_epoch(0)
    assert list(sampler) == whole


@pytest.mark.parametrize("size", [5, 12, 23, 24, 25, 100])
@pytest.mark.parametrize("exact", [True, False])
def test_a_run_continued_by_fewer_ranks_sees_each_sample_of_the_epoch_in_the_same_global_batches(
    size: int, exact: bool
) -> None:
    """4 ranks, then 2, 3 and 1, each for some global batches of 12."""

    def batches(num_ranks: int, start: int, stop: int | None) -> list[set[int]]:
        batch_size = 12 // num_ranks
        samplers = [
            ElasticSampler(range(size), batch_size=batch_size, num_replicas=num_ranks, rank=rank, exact=exact)
            for rank in range(num_ranks)
        ]
        for sampler in samplers:
            sampler.set_epoch(3)
            sampler.skip(start * batch_size)
        shards = [list(sampler) for sampler in samplers]
        count = -(-size // 12) - start if stop is None else stop - start
        steps = [[shard[i * batch_size : (i + 1) * batch_size] for shard in shards] for i in range(count)]
        return [set(sum(step, [])) for step in steps]

    # The oracle: the permutation itself, cut into runs of 12.
    order = Permutation(size, 0, 3)(np.arange(size)).tolist()
    expected = [set(order[first : first + 12]) for first in range(0, size, 12)]
    continued = [*batches(4, 0, 1), *batches(2, 1, 2), *batches(3, 2, 4), *batches(1, 4, None)]
    found = [batch for batch in continued if batch]
    if exact:
        assert found == expected
    else:  # the last batch is padded from the start of the order
        assert found[:-1] == expected[:-1]
        assert expected[-1] <= found[-1] <= expected[-1] | set(order[:4])


def start_of_a_thousand_million() -> int:
    sampler = ElasticSampler(range(10**9), batch_size=32, num_replicas=8, rank=3)
    sampler.set_epoch(1)
    sampler.skip(10**8)
    return next(iter(sampler))


def test_a_thousand_million_samples_start_within_a_thousand_calls_and_ten_megabytes() -> None:
    tracemalloc.start()
    assert 0 <= start_of_a_thousand_million() < 10**9
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10e6
    calls: list[str] = []
    sys.setprofile(lambda frame, kind, argument: calls.append(kind))
    try:
        start_of_a_thousand_million()
    finally:
        sys.setprofile(None)
    assert len(calls) < 1000  # not the time: the machine may be busy. To skip 10^8 samples one by one takes as many


def test_indices_carry_the_epoch_they_were_drawn_in_where_they_are_to() -> None:
    sampler = ElasticSampler(range(4), num_replicas=1, rank=0)
    assert {type(index) for index in sampler} == {int}
    sampler.carries_epoch = True
    sampler.set_epoch(6)
    begun = iter(sampler)
    first: Any = next(begun)
    sampler.set_epoch(7)
    later: Any = next(begun)  # of the iteration begun before
    assert (first.epoch, later.epoch) == (6, 6)
    assert {index.epoch for index in sampler} == {7}  # type: ignore[attr-defined]


def test_it_is_a_distributed_sampler_and_iterates_over_a_data_set_that_grows() -> None:
    data = [0, 1, 2]
    sampler = ElasticSampler(data, num_replicas=1, rank=0, shuffle=False)
    assert isinstance(sampler, DistributedSampler)
    data.append(3)
    assert list(sampler) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_replicas": 2, "rank": 2}, ValueError, "rank=2 must lie below num_replicas=2"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
        ({"batch_size": 1.5}, TypeError, "batch_size=1.5 must be a whole number"),
        ({"exact": True, "drop_last": True}, ValueError, "choose one"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ElasticSampler(range(4), **options)  # type: ignore[arg-type]


def state(**changed: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"batch_size": 16, "num_replicas": 4, "rank": 0, "seed": 3, **changed}
    return ElasticSampler(range(options.pop("size", 100)), **options).state()


def test_what_a_resumed_run_must_find_unchanged_does_not_depend_on_the_number_of_ranks() -> None:
    assert state() == {
        "length": 100,
        "global_batch_size": 64,
        "seed": 3,
        "shuffle": True,
        "exact": False,
        "drop_last": False,
    }
    refuse_changes(changed_order(state(), state(batch_size=64, num_replicas=1)))
    refuse_changes(changed_order(state(rank=1), state(batch_size=32, num_replicas=2)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 99}, "the number of samples was 100 and is 99: continue with the data set"),
        ({"num_replicas": 3}, "the global batch was 64 and is 48: pass global_batch_size=64 to prepare_data_loader()"),
        ({"seed": 4}, "the seed of the order was 3 and is 4: pass seed=3"),
        ({"shuffle": False}, "shuffle was True and is False: build the loader with shuffle=True"),
        ({"exact": True}, "exact was False and is True"),
        ({"drop_last": True}, "drop_last was False and is True"),
    ],
)
def test_what_changed_is_named_with_both_values_and_the_way_back(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        refuse_changes(changed_order(state(), state(**changed)))
    assert "allow_changed_data=True" in str(raised.value)
    assert str(raised.value).count(" and is ") == 1


def test_all_that_changed_is_named_at_once_and_what_is_missing_too() -> None:
    with pytest.raises(ValueError, match=r"is 48.*\n.*is 9:"):
        refuse_changes(changed_order(state(), state(num_replicas=3, seed=9)))
    with pytest.raises(ValueError, match="no 'length': it holds \\['seed'\\]"):
        refuse_changes(changed_order({"seed": 1}, state()))


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**6))
@settings(max_examples=200)
def test_a_permutation_takes_every_value_once(size: int, seed: int, epoch: int) -> None:
    values = Permutation(size, seed, epoch)(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**32 - 5, 2**32, 2**32 + 5, 2**40 + 1, 2**62 + 3])
def test_a_permutation_of_more_numbers_than_fit_32_bits_stays_in_range_and_repeats_nothing(size: int) -> None:
    positions = np.linspace(0, size - 1, 10_001).astype(np.int64)
    positions = np.unique(np.minimum(positions, size - 1))
    values = Permutation(size, 1, 2)(positions)
    assert len(set(values.tolist())) == len(positions)
    assert max(values.tolist()) < size


@pytest.mark.parametrize("size", [3, 8, 10, 100, 130])
def test_positions_values_and_neighbours_are_spread_as_in_a_random_permutation(size: int) -> None:
    num_epochs = 2000
    table = np.zeros((size, size))
    distances = np.zeros(size)
    for epoch in range(num_epochs):
        values = Permutation(size, 0, epoch)(np.arange(size)).astype(np.int64)
        table[np.arange(size), values] += 1
        distances += np.bincount(np.diff(values) % size, minlength=size)
    expected = num_epochs / size
    chi_square = ((table - expected) ** 2 / expected).sum() / (size - 1) ** 2
    assert chi_square < 4  # 1 on average; a list that is merely rotated gives some 2000
    expected = num_epochs
    assert ((distances[1:] - expected) ** 2 / expected).sum() / max(size - 2, 1) < 6
