"""What samplers of the user's draw, dealt out over ranks: the same for any number of them, and good random numbers."""

import random
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dengine import Engine, Events
from dengine.data.loader import data_state, pass_counters
from dengine.distributed import ElasticSampler, World, prepare_data_loader
from dengine.handlers import Checkpoint

LENGTH = 23
NUMBERS = TensorDataset(torch.arange(LENGTH))
WEIGHTS = [float(index % 5) for index in range(LENGTH)]


class InEpochs(Sampler[int]):
    """Deterministic in `set_epoch`."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 17

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(self.epoch).sample(range(LENGTH), 17))


class Seeded(Sampler[int]):
    """Draws from generators of its own, pass after pass."""

    def __init__(self, seed: int = 3) -> None:
        self.of_torch = torch.Generator().manual_seed(seed)
        self.of_numpy, self.of_python = np.random.default_rng(seed), random.Random(seed)

    def __len__(self) -> int:
        return 3 * 5

    def __iter__(self) -> Iterator[int]:
        yield from torch.randint(LENGTH, (5,), generator=self.of_torch)  # tensors, as indices
        yield from self.of_numpy.integers(LENGTH, size=5)
        yield from self.of_python.sample(range(LENGTH), 5)


class Unseeded(Sampler[int]):
    """Draws from the global generators."""

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(LENGTH)[:6].tolist()
        yield from np.random.permutation(LENGTH)[:6].tolist()


class Buckets(Sampler[list[int]]):
    """Batches of different lengths, in another order each epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 7 + self.epoch % 2

    def __iter__(self) -> Iterator[list[int]]:
        order = random.Random(self.epoch).sample(range(LENGTH), LENGTH)
        cuts = [0, 2, 7, 8, 9, 12, *([15] if self.epoch % 2 else []), 16, LENGTH]
        yield from (order[first:last] for first, last in pairwise(cuts))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


KINDS: dict[str, Callable[[], Sampler[Any]]] = {
    "weighted": lambda: WeightedRandomSampler(WEIGHTS, 19),
    "weighted with a generator": lambda: WeightedRandomSampler(WEIGHTS, 19, generator=generator()),
    "weighted, each once": lambda: WeightedRandomSampler(WEIGHTS, 16, replacement=False),
    "replaced": lambda: RandomSampler(NUMBERS, replacement=True, num_samples=31),
    "few": lambda: RandomSampler(NUMBERS, num_samples=9),
    "many": lambda: RandomSampler(NUMBERS, num_samples=55, generator=generator()),
    "subset": lambda: SubsetRandomSampler(range(4, 21, 2)),
    "a part": lambda: SequentialSampler(range(11)),
    "in epochs": InEpochs,
    "seeded": Seeded,
    "unseeded": Unseeded,
}


def on(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    for module in ("loader", "sampler", "dealt_batches"):
        monkeypatch.setattr(f"dengine.data.{module}.world", lambda: World(rank=rank, size=size))


def batches_of(loader: DataLoader[Any]) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def epochs_of(
    monkeypatch: pytest.MonkeyPatch, size: int, sampler: Callable[[], Any], **options: Any
) -> list[list[list[int]]]:
    """The global batches of three epochs, over `size` ranks."""
    found: list[list[list[int]]] = [[], [], []]
    for rank in range(size):
        on(monkeypatch, rank, size)
        loader = DataLoader(NUMBERS, batch_size=6 // size, sampler=sampler())
        prepared = prepare_data_loader(loader, **options)
        for epoch in found:
            for step, batch in enumerate(batches_of(prepared)):
                epoch.extend([] for _ in range(step + 1 - len(epoch)))
                epoch[step].extend(batch)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_has_the_same_global_batches_and_each_draw_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = epochs_of(monkeypatch, 1, KINDS[kind], exact=True)
    assert whole == epochs_of(monkeypatch, 1, KINDS[kind], exact=True)
    for size in (2, 3, 6):
        assert epochs_of(monkeypatch, size, KINDS[kind], exact=True) == whole
    assert all(len(sum(epoch, [])) == len(KINDS[kind]()) for epoch in whole)  # type: ignore[arg-type]
    for number, epoch in enumerate(whole):
        plain: Any = KINDS[kind]()
        if kind in ("in epochs", "a part"):
            plain.epoch = number
            assert sum(epoch, []) == list(plain)
        assert set(sum(epoch, [])) <= {int(index) for _ in range(99) for index in plain}
    assert (whole[0] != whole[1] != whole[2] != whole[0]) is (kind != "a part")
    others = epochs_of(monkeypatch, 1, KINDS[kind], exact=True, seed=1)
    assert (others == whole) is (kind in ("a part", "in epochs"))
    sizes = {len(epoch) for epoch in epochs_of(monkeypatch, 2, KINDS[kind])}
    assert sizes == {-(-len(KINDS[kind]()) // 6)}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_draw_leaves_the_global_generators_and_the_user_s_as_they_were(kind: str) -> None:
    sampler: Any = KINDS[kind]()
    states = [torch.get_rng_state().tolist(), np.random.get_state()[2], random.getstate()]
    of_sampler = getattr(sampler, "generator", None) or getattr(sampler, "of_torch", None)
    own = None if of_sampler is None else of_sampler.get_state().tolist()
    batches_of(prepare_data_loader(DataLoader(NUMBERS, sampler=sampler)))
    assert [torch.get_rng_state().tolist(), np.random.get_state()[2], random.getstate()] == states
    assert own is None or of_sampler.get_state().tolist() == own


@pytest.mark.parametrize(
    "sampler_of",
    [
        lambda seed: WeightedRandomSampler(WEIGHTS, 19, generator=torch.Generator().manual_seed(seed)),
        lambda seed: RandomSampler(NUMBERS, replacement=True, generator=torch.Generator().manual_seed(seed)),
        lambda seed: SubsetRandomSampler(range(20), generator=torch.Generator().manual_seed(seed)),
        Seeded,
    ],
)
def test_the_state_of_the_user_s_generator_is_the_seed(sampler_of: Callable[[int], Any]) -> None:
    first, again, other = (
        batches_of(prepare_data_loader(DataLoader(NUMBERS, batch_size=4, sampler=sampler_of(seed))))
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_begins_anywhere_and_goes_on_to_the_next_epoch_by_itself(kind: str) -> None:
    prepared = prepare_data_loader(DataLoader(NUMBERS, batch_size=2, sampler=KINDS[kind]()))
    sampler: Any = prepared.sampler
    epochs = [batches_of(prepared) for _ in range(3)]
    for epoch in (1, 2, 0):
        sampler.set_epoch(epoch)
        sampler.skip(2 * 3)
        assert batches_of(prepared) == epochs[epoch][3:]
    assert pass_counters(prepared)[0].epoch == 0
    again = prepare_data_loader(prepared)
    assert [batches_of(again) for _ in range(3)] == epochs


def test_the_data_set_draws_the_same_for_a_sample_of_an_epoch() -> None:
    class Noise(Dataset[tuple[int, float]]):
        def __len__(self) -> int:
            return LENGTH

        def __getitem__(self, index: int) -> tuple[int, float]:
            return index, random.random()

    def drawn(loader: DataLoader[Any]) -> list[tuple[int, float]]:
        prepared = prepare_data_loader(loader)
        return [
            pair
            for _ in range(2)
            for batch in prepared
            for pair in zip(*(part.tolist() for part in batch), strict=True)
        ]

    found = drawn(DataLoader(Noise(), batch_size=4, sampler=SubsetRandomSampler(range(LENGTH))))
    in_batches = drawn(DataLoader(Noise(), batch_sampler=[list(range(LENGTH))]))
    assert sorted(found[:LENGTH]) == sorted(in_batches[:LENGTH])
    assert sorted(found[LENGTH:]) == sorted(in_batches[LENGTH:])
    assert len({noise for _, noise in found}) == 2 * LENGTH


def numbers_of(sampler: Sampler[int], size: int, num_epochs: int = 1) -> "np.typing.NDArray[np.int64]":
    prepared = prepare_data_loader(DataLoader(range(size), sampler=sampler))  # type: ignore[arg-type]
    return np.array([list(prepared.sampler) for _ in range(num_epochs)])


def test_draws_with_replacement_are_as_good_as_independent_ones() -> None:
    size, num = 50, 400_000
    weights = np.arange(size) % 7 + 0.0
    for sampler, expected in (
        (WeightedRandomSampler(weights.tolist(), num), weights / weights.sum()),
        (RandomSampler(range(size), replacement=True, num_samples=num), np.full(size, 1 / size)),
    ):
        first, second = numbers_of(sampler, size, 2)
        has_any = expected > 0
        for drawn in (first, second):
            counts = np.bincount(drawn, minlength=size)
            assert counts[~has_any].sum() == 0
            chi_square = ((counts - num * expected)[has_any] ** 2 / (num * expected[has_any])).sum()
            freedom = has_any.sum() - 1
            assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
        outer = np.outer(expected, expected)
        for left, right in ((first[:-1], first[1:]), (first[:-64], first[64:]), (first, second)):
            pairs = np.histogram2d(left, right, bins=size, range=[[-0.5, size - 0.5]] * 2)[0]
            wanted = len(left) * outer
            chi_square = ((pairs - wanted)[outer > 0] ** 2 / wanted[outer > 0]).sum()
            freedom = (outer > 0).sum() - 1
            assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_extreme_weights_are_drawn_right() -> None:
    assert set(numbers_of(WeightedRandomSampler([0.0, 1e308, 0.0, 1e308, 0.0], 1000), 5)[0].tolist()) == {1, 3}
    assert set(numbers_of(WeightedRandomSampler([5e-324, 0.0], 10), 2)[0].tolist()) == {0}


@pytest.mark.parametrize("indices", [[9, 3, 3, 7], range(20, 8, -3), torch.tensor([1, 4, 22]), np.array([0, 5])])
def test_a_subset_is_drawn_once_and_no_other_samples(indices: Any) -> None:
    drawn = numbers_of(SubsetRandomSampler(indices), LENGTH, 20)
    assert all(sorted(epoch) == sorted(int(index) for index in indices) for epoch in drawn.tolist())
    assert len({str(epoch) for epoch in drawn.tolist()}) > 1


def test_permutations_follow_one_another() -> None:
    drawn = numbers_of(RandomSampler(range(10), num_samples=35), 10)[0].tolist()
    turns = [drawn[first : first + 10] for first in range(0, 40, 10)]
    assert [sorted(turn) for turn in turns[:3]] == [list(range(10))] * 3
    assert len(set(turns[3])) == 5
    assert turns[0] != turns[1] != turns[2] != turns[0]


# -- batch samplers ----------------------------------------------------------------------------------------------


def parts_of(monkeypatch: pytest.MonkeyPatch, size: int, **options: Any) -> list[list[list[list[int]]]]:
    """The batches of each rank in three epochs."""
    parts = []
    for rank in range(size):
        on(monkeypatch, rank, size)
        prepared = prepare_data_loader(DataLoader(NUMBERS, batch_sampler=Buckets()), **options)
        epochs = []
        for _ in range(3):
            epochs.append(batches_of(prepared))
            assert len(epochs[-1]) == len(prepared)
        parts.append(epochs)
    return parts


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_a_batch_sampler_is_dealt_out_in_whole_rounds(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[list[list[int]]] = []
    for number in range(3):
        buckets = Buckets()
        buckets.set_epoch(number)
        expected.append(list(buckets))
    exact = parts_of(monkeypatch, size, exact=True)
    assert exact == [[epoch[rank::size] for epoch in expected] for rank in range(size)]
    padded = parts_of(monkeypatch, size)
    for number, epoch in enumerate(expected):
        steps = [list(step) for step in zip(*(part[number] for part in padded), strict=True)]
        assert sum(steps, []) == (epoch * 2)[: -(-len(epoch) // size) * size]


def test_a_batch_sampler_of_torch_is_dealt_out_by_its_samples() -> None:
    batches = BatchSampler(WeightedRandomSampler(WEIGHTS, 19), 4, True)
    prepared = prepare_data_loader(DataLoader(NUMBERS, batch_sampler=batches))
    plain = prepare_data_loader(
        DataLoader(NUMBERS, batch_size=4, sampler=WeightedRandomSampler(WEIGHTS, 19), drop_last=True)
    )
    assert batches_of(prepared) == batches_of(plain)
    assert isinstance(prepared.sampler, ElasticSampler)
    shuffled = prepare_data_loader(DataLoader(NUMBERS, batch_sampler=BatchSampler(RandomSampler(NUMBERS), 4, False)))
    assert batches_of(shuffled) == batches_of(prepare_data_loader(DataLoader(NUMBERS, batch_size=4, shuffle=True)))


def test_a_dealt_out_loader_can_be_prepared_again_and_skips() -> None:
    prepared: Any = prepare_data_loader(prepare_data_loader(DataLoader(NUMBERS, batch_sampler=Buckets())))
    whole = [batches_of(prepared) for _ in range(2)]
    prepared.batch_sampler.set_epoch(1)
    prepared.batch_sampler.skip(5)
    assert batches_of(prepared) == whole[1][5:]


@pytest.mark.parametrize("in_batches", [False, True])
def test_the_user_may_tell_his_own_sampler_the_epoch(in_batches: bool) -> None:
    def prepared_of(sampler: Any) -> DataLoader[Any]:
        options = {"batch_sampler": sampler} if in_batches else {"sampler": sampler, "batch_size": 4}
        return prepare_data_loader(DataLoader(NUMBERS, **options))

    sampler = Buckets() if in_batches else InEpochs()
    whole = prepared_of(Buckets() if in_batches else InEpochs())
    epochs = [batches_of(whole) for _ in range(5)]
    prepared: Any = prepared_of(sampler)
    sampler.set_epoch(3)
    assert [batches_of(prepared) for _ in range(2)] == epochs[3:]
    sampler.set_epoch(1)
    assert batches_of(prepared) == epochs[1]
    sampler.set_epoch(1)
    (prepared.batch_sampler if in_batches else prepared.sampler).set_epoch(4)
    assert batches_of(prepared) == epochs[4]


@pytest.mark.parametrize("until", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["weighted", "weighted with a generator", "replaced", "subset", "seeded"])
def test_a_loader_that_is_not_prepared_goes_on_where_it_was(tmp_path: Path, kind: str, until: int) -> None:
    def run(folder: str, max_iterations: int | None) -> list[list[int]]:
        torch.manual_seed(2)
        found: list[list[int]] = []
        trainer = Engine(lambda engine, batch: found.append(batch[0].tolist()))
        trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint({"trainer": trainer}, tmp_path / folder))
        Checkpoint.resume(tmp_path / folder, {"trainer": trainer})
        loader = DataLoader(NUMBERS, batch_size=5, sampler=KINDS[kind]())
        trainer.run(loader, max_epochs=4, max_iterations=max_iterations)
        return found

    assert run("parts", until) + run("parts", None) == run("whole", None)


# -- bad input ---------------------------------------------------------------------------------------------------


class Of(Sampler[Any]):
    def __init__(self, given: Any, length: int) -> None:
        self.given, self.length = given, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.given)


class Endless(Of):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Counting(Of):
    """Goes on with each pass, and nobody can tell it where."""

    def __iter__(self) -> Iterator[int]:
        self.given = [(each + 1) % LENGTH for each in self.given]
        return iter(self.given)


class Grouped(Buckets):
    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.sampler = sampler


class WithoutLength:
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0]])


class Dynamic(WithoutLength):
    """As torch_geometric's DynamicBatchSampler."""

    def __len__(self) -> int:
        raise ValueError("The length of 'Dynamic' is undefined since the number of steps per epoch is ambiguous")


def sampled(sampler: Any) -> DataLoader[Any]:
    return DataLoader(NUMBERS, sampler=sampler)


def in_batches(batch_sampler: Any) -> DataLoader[Any]:
    return DataLoader(NUMBERS, batch_sampler=batch_sampler)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (lambda: sampled(Of([1, 2], 3)), ValueError, "Of says that its length is 3, but gives 2 indices in epoch 0"),
        (lambda: sampled(Of([1, 2], 1)), ValueError, "says that its length is 1, but gives more indices in epoch 0"),
        (lambda: sampled(Endless([], 5)), ValueError, "says that its length is 5, but gives more indices in epoch 0"),
        (lambda: in_batches(Of([[1]], 2)), ValueError, "says that its length is 2, but gives 1 batches in epoch 0"),
        (lambda: sampled(Of([1, 23], 2)), ValueError, "gives index 23 in epoch 0, but the data set has 23 samples"),
        (lambda: in_batches(Of([[1], [-24]], 2)), ValueError, "gives index -24 in epoch 0, but the data set has 23"),
        (lambda: sampled(SubsetRandomSampler([30])), ValueError, "gives index 30, but the data set has 23 samples"),
        (lambda: sampled(RandomSampler(range(40))), ValueError, "gives index 39, but the data set has 23 samples"),
        (lambda: sampled(SequentialSampler(range(24))), ValueError, "gives index 23 in epoch 0, but the data set has"),
        (lambda: sampled(RandomSampler([], num_samples=2)), ValueError, "draws 2 of no samples"),
        (lambda: sampled(WithoutLength()), TypeError, "WithoutLength has no length (object of type"),
        (lambda: in_batches(Dynamic()), TypeError, "give it a __len__ that counts its batches"),
        (lambda: sampled(Counting([1, 2], 2)), ValueError, "gave other indices as it was asked for epoch 0 once more"),
        (lambda: in_batches(map(list, [])), TypeError, "map has no length"),
        (
            lambda: sampled(Of([[1]], 1)),
            TypeError,
            "gives a list as an index, but prepare_data_loader() deals out whole",
        ),
        (lambda: sampled(Of(["a"], 1)), TypeError, "gives a str as an index"),
        (lambda: sampled(WeightedRandomSampler([1.0] * 22, 5)), ValueError, "has 22 weights, but the data set has 23"),
        (
            lambda: sampled(WeightedRandomSampler([1.0] * 24, 5, replacement=False)),
            ValueError,
            "has 24 weights, but the data set has 23 samples: give it one weight for each sample",
        ),
        (lambda: sampled(WeightedRandomSampler([0.0] * 23, 5)), ValueError, "some above 0, but all of them are 0"),
        (lambda: sampled(WeightedRandomSampler([1.0] * 22 + [-1.0], 5)), ValueError, "but weight 22 is -1.0"),
        (lambda: sampled(WeightedRandomSampler([float("nan")] + [1.0] * 22, 5)), ValueError, "but weight 0 is nan"),
        (
            lambda: in_batches(Grouped(DistributedSampler(NUMBERS, 2, 0))),
            ValueError,
            "Grouped gives one of 2 parts of the samples already (its DistributedSampler does)",
        ),
    ],
)
def test_bad_samplers_are_named_with_the_way_out(
    loader: Callable[[], DataLoader[Any]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        next(iter(prepare_data_loader(loader())))


def test_a_global_batch_size_is_refused_for_batches_that_are_dealt_out_whole() -> None:
    with pytest.raises(ValueError, match="global_batch_size=4 is for loaders with a batch_size, but .* a Buckets"):
        prepare_data_loader(DataLoader(NUMBERS, batch_sampler=Buckets()), global_batch_size=4)


def test_the_state_names_what_the_order_depends_on() -> None:
    def state(sampler: Any) -> Any:
        return data_state(prepare_data_loader(DataLoader(NUMBERS, sampler=sampler)))

    assert (
        state(SubsetRandomSampler([1, 2])) == state(SubsetRandomSampler([1, 2])) != state(SubsetRandomSampler([1, 3]))
    )
    other = [*WEIGHTS[:-1], 9.0]
    assert state(WeightedRandomSampler(WEIGHTS, 9)) != state(WeightedRandomSampler(other, 9))
    assert state(InEpochs()) == state(InEpochs())
    assert "sampler" not in state(RandomSampler(NUMBERS))
