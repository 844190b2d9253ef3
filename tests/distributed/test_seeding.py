"""A data set that draws at random gives the same samples by any number of workers, and from wherever a run goes on."""

import copy
import pickle
import random
import timeit
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    get_worker_info,
)

from dengine import Engine, Events
from dengine.data.seeding import (
    EpochIndex,
    SeededCollate,
    SeededDataset,
    draws_nothing,
    seed_generators,
)
from dengine.distributed import prepare_data_loader
from dengine.splitmix64 import derived_seed

Drawn = tuple[int, float, float, float, float]


def draws() -> tuple[float, float, float, float]:
    """One number of each generator, and one of those that are made in pairs and kept."""
    return random.random(), float(np.random.rand()), torch.rand(()).item(), random.gauss(0, 1) + np.random.normal()


class Augmented(Dataset[Drawn]):
    """Draws another number of times for each sample, so that a state carried over would show."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Drawn:
        assert type(index) is int
        for _ in range(index % 3):
            draws()
        return (index, *draws())


class Batched(Augmented):
    def __getitems__(self, indices: list[int]) -> list[Drawn]:
        return [self[index] for index in indices]


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def seen(dataset: Any, num_epochs: int = 3, batch_size: int = 3, **options: Any) -> list[list[list[Drawn]]]:
    """The batches of each epoch."""
    loader = DataLoader(dataset, batch_size=batch_size, **{"collate_fn": as_list, **options})
    epochs: list[list[Any]] = []
    trainer = Engine(lambda engine, batch: epochs[-1].append(batch))
    trainer.on(Events.EPOCH_STARTED, lambda engine: epochs.append([]))
    trainer.run(prepare_data_loader(loader, seed=5), max_epochs=num_epochs)
    return epochs


@pytest.mark.parametrize("kind", [Augmented, Batched])
def test_samples_do_not_depend_on_the_number_of_workers_nor_on_how_long_they_live(kind: type[Augmented]) -> None:
    expected = seen(kind(), shuffle=True)
    assert seen(kind(), shuffle=True, num_workers=1) == expected
    assert seen(kind(), shuffle=True, num_workers=2, persistent_workers=True) == expected
    assert seen(kind(), shuffle=True, num_workers=2, prefetch_factor=4) == expected


def test_samples_do_not_depend_on_the_batch_nor_on_how_they_are_fetched() -> None:
    one_by_one = [sample for epoch in seen(Augmented(), batch_size=1) for batch in epoch for sample in batch]
    for other in (seen(Batched(), batch_size=4), seen(Augmented(), batch_size=7), seen(Subset(Augmented(), range(10)))):
        assert [sample for epoch in other for batch in epoch for sample in batch] == one_by_one


def test_each_sample_of_each_epoch_has_random_numbers_of_its_own() -> None:
    numbers = [number for epoch in seen(Augmented(20)) for batch in epoch for sample in batch for number in sample[1:4]]
    assert len(set(numbers)) == 20 * 3 * 3


def test_numpy_and_torch_which_draw_by_one_algorithm_do_not_draw_the_same_numbers() -> None:
    def raw_31_bits() -> tuple[int, int]:
        of_torch = torch.empty(1, dtype=torch.int32).random_().item()
        return int(of_torch), int(np.random.get_bit_generator().random_raw()) % 2**31  # type: ignore[attr-defined]

    np.random.seed(5)
    torch.manual_seed(5)
    assert len(set(raw_31_bits())) == 1  # that is how one would see it
    seed_generators(derived_seed(0, 0, 0))
    assert len(set(raw_31_bits())) == 2


def test_a_derived_seed_depends_on_each_number_and_on_the_order() -> None:
    numbers = range(-2, 8)
    seeds = {derived_seed(one, two, three) for one in numbers for two in numbers for three in numbers}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)
    bits = sum(bin(derived_seed(0, 0, i) ^ derived_seed(0, 0, i + 1)).count("1") for i in range(1000)) / 1000
    assert 31 < bits < 33  # neighbours differ in half of the bits


# -- the generators around ---------------------------------------------------------------------------------------


class Stream(IterableDataset[Drawn]):
    """Shuffles and augments at random; keeps what it was told about the epoch."""

    def __init__(self, size: int = 10) -> None:
        self.size = size
        self.epoch = -1

    def __iter__(self) -> Iterator[Drawn]:
        for index in np.random.permutation(self.size).tolist():
            yield (100 * self.epoch + index, *draws())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("dataset", [Augmented(), Batched(), Stream(), TensorDataset(torch.arange(10))])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterating_leaves_the_generators_of_the_script_alone(dataset: Any, num_workers: int) -> None:
    def drawn_between(is_iterating: bool) -> list[Any]:
        loader = prepare_data_loader(
            DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=as_list), seed=1
        )
        seed_generators(9)
        drawn: list[Any] = [draws()]
        for _ in range(2):
            drawn += [draws() for _ in (loader if is_iterating else range(5))]
        return drawn

    assert drawn_between(True) == drawn_between(False)


def test_a_fetch_that_fails_leaves_the_generators_alone_too() -> None:
    class Failing(Augmented):
        def __getitem__(self, index: int) -> Drawn:
            draws()
            raise OSError("unreadable")

    loader = prepare_data_loader(DataLoader(Failing(), batch_size=2))
    seed_generators(1)
    expected = draws()
    seed_generators(1)
    with pytest.raises(OSError, match="unreadable"):
        next(iter(loader))
    assert draws() == expected


# -- a resumed run -----------------------------------------------------------------------------------------------


def mixed(samples: list[Any]) -> tuple[list[Any], float, float]:
    """A collate function that draws, as one that masks words or mixes pictures does."""
    return samples, random.random(), torch.rand(()).item()


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("dataset", [Augmented(7), Batched(7), TensorDataset(torch.arange(7.0)), Stream(7)])
def test_a_run_resumed_at_any_iteration_sees_what_it_would_have_seen(dataset: Any, options: Any) -> None:
    if isinstance(dataset, Stream):
        options = {**options, "num_workers": min(1, options.get("num_workers", 0))}  # each worker reads all of it

    def run(log: list[Any], states: list[Any], resumed: Any = None, max_iterations: int = 8) -> None:
        loader = DataLoader(
            copy.deepcopy(dataset),
            batch_size=2,
            shuffle=None if isinstance(dataset, Stream) else True,
            collate_fn=mixed,
            **options,
        )
        trainer = Engine(lambda engine, batch: log.append(batch))
        trainer.on(
            Events.ITERATION_COMPLETED, lambda engine: states.append((engine.state_dict(), engine.random_state()))
        )
        if resumed is not None:
            trainer.load_state_dict(resumed[0])
            trainer.load_random_state(resumed[1])
        trainer.run(prepare_data_loader(loader), max_epochs=3, max_iterations=max_iterations)

    seed_generators(0)
    whole: list[Any] = []
    states: list[Any] = []
    run(whole, states)
    for taken in (1, 3, 4, 6):
        seed_generators(taken)
        rest: list[Any] = []
        run(rest, [], states[taken - 1])
        assert repr(rest) == repr(whole[taken:]), taken


# -- collate functions that draw ---------------------------------------------------------------------------------


def mixed_by_length(samples: list[Any]) -> Any:
    """Draws more often for a longer batch: a state carried on to the next one would show."""
    return samples, [draws() for _ in samples]


def unmixed(sample: Any) -> Any:
    return sample, draws()


@pytest.mark.parametrize("dataset", [Augmented(), Batched(), TensorDataset(torch.arange(10)), list(range(10))])
def test_what_a_collate_function_draws_does_not_depend_on_the_workers(dataset: Any) -> None:
    expected = seen(dataset, collate_fn=mixed_by_length, shuffle=True)
    drawn = {repr(batch[1]) for epoch in expected for batch in epoch}
    assert len(drawn) == 3 * 4  # its own in each batch of each epoch
    for options in ({"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}):
        again = seen(dataset, collate_fn=mixed_by_length, shuffle=True, **options)
        assert repr(again) == repr(expected)


def test_a_collate_function_draws_other_numbers_than_the_samples_of_its_batch() -> None:
    (epoch,) = seen(Augmented(), num_epochs=1, batch_size=1, collate_fn=mixed_by_length)
    assert all(samples[0][1:] != drawn[0] for samples, drawn in epoch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_without_batches_are_collated_reproducibly_too(num_workers: int) -> None:
    expected = seen(Augmented(), num_epochs=2, batch_size=None, collate_fn=unmixed)  # type: ignore[arg-type]
    found = seen(Augmented(), num_epochs=2, batch_size=None, collate_fn=unmixed, num_workers=num_workers)  # type: ignore[arg-type]
    assert found == expected
    assert len({drawn for epoch in found for _, drawn in epoch}) == 20


def test_a_collate_function_leaves_a_stream_s_draws_alone_in_a_worker_or_not() -> None:
    """Ranks read one stream: were its draws moved by what each rank collates, they would no longer read the same."""
    plain = seen(Stream())
    for options in ({}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}):
        found = seen(Stream(), collate_fn=mixed_by_length, **options)
        assert [[samples for samples, _ in epoch] for epoch in found] == plain
        assert len({repr(drawn) for epoch in found for _, drawn in epoch}) == 3 * 4
        assert found == seen(Stream(), collate_fn=mixed_by_length)


def test_collating_leaves_the_generators_of_the_script_alone() -> None:
    loader = prepare_data_loader(DataLoader(Augmented(), batch_size=4, collate_fn=mixed_by_length))
    seed_generators(9)
    expected = draws()
    seed_generators(9)
    assert len(list(loader)) == 3
    assert draws() == expected


def test_a_pickled_data_set_tells_the_collate_function_that_came_with_it() -> None:
    prepared: Any = prepare_data_loader(DataLoader(Augmented(), collate_fn=as_list))
    dataset, collate = pickle.loads(pickle.dumps((prepared.dataset, prepared.collate_fn)))
    assert isinstance(collate, SeededCollate)
    dataset[EpochIndex.of(2)(3)]
    assert collate.next_seed is not None
    twice: Any = prepare_data_loader(prepared, seed=1)
    assert twice.collate_fn.inside is as_list
    assert twice.dataset._dataset is prepared.dataset._dataset


# -- streams -----------------------------------------------------------------------------------------------------


def test_a_stream_is_seeded_by_the_epoch_and_hears_of_it_in_workers_that_outlive_one() -> None:
    expected = seen(Stream())
    assert len({sample for epoch in expected for batch in epoch for sample in batch}) == 30
    assert [epoch[0][0][0] // 100 for epoch in expected] == [0, 1, 2]
    assert seen(Stream(), num_workers=1) == seen(Stream(), num_workers=1, persistent_workers=True) == expected


class Telling(Augmented):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        return (self.epoch, get_worker_info() is not None)


def test_a_data_set_hears_of_the_epoch_in_workers_that_outlive_one() -> None:
    epochs = seen(Telling(), num_workers=2, persistent_workers=True)
    assert [set(sum(epoch, [])) for epoch in epochs] == [{(0, True)}, {(1, True)}, {(2, True)}]


# -- batched fetches ---------------------------------------------------------------------------------------------


class Counted(Batched):
    """Draws in one sample only, if at all; counts its fetches."""

    def __init__(self, drawing: int | None) -> None:
        super().__init__()
        self.drawing = drawing
        self.fetches: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.fetches.append(indices)
        return [(index, random.random() if index == self.drawing else 0.0) for index in indices]


def test_a_batched_fetch_stays_one_as_long_as_it_draws_nothing() -> None:
    dataset = Counted(None)
    seen(dataset, num_epochs=1, batch_size=5)
    assert dataset.fetches == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 10])
def test_a_batched_fetch_that_draws_late_gives_the_same_by_any_batch(batch_size: int) -> None:
    (epoch,) = seen(Counted(7), num_epochs=1, batch_size=batch_size)
    (alone,) = seen(Counted(7), num_epochs=1, batch_size=1)
    assert sum(epoch, []) == sum(alone, [])


class Columns(Batched):
    def __getitems__(self, indices: list[int]) -> Any:
        return {"index": indices, "drawn": [random.random() for _ in indices]}


def test_a_batched_fetch_of_no_list_is_seeded_as_a_whole() -> None:
    first, second = (seen(Columns(), num_epochs=2, batch_size=5, num_workers=workers) for workers in (0, 2))
    assert first == second
    assert first[0][0]["index"] == [0, 1, 2, 3, 4]  # type: ignore[call-overload]
    assert first[0] != first[1]


# -- the parts ---------------------------------------------------------------------------------------------------


def test_an_index_with_an_epoch_is_an_index_and_pickles() -> None:
    index = EpochIndex.of(7)(2)
    assert index == 2
    assert hash(index) == hash(2)
    assert [10, 11, 12][index] == 12
    assert torch.arange(5)[index].item() == 2
    assert np.arange(5)[index] == 2
    assert {2: "two"}[index] == "two"
    for copied in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert (copied, copied.epoch, isinstance(copied, EpochIndex)) == (2, 7, True)
    pandas = pytest.importorskip("pandas")
    assert pandas.Series([5, 6, 7]).iloc[index] == 7


class WithFile(Augmented):
    file: str | None = None

    def __getitem__(self, index: int) -> Any:
        return self.file


def open_file(worker: int) -> None:
    get_worker_info().dataset.file = f"opened by {worker}"


def test_a_worker_sets_attributes_on_the_data_set_inside() -> None:
    (epoch,) = seen(WithFile(2), num_epochs=1, num_workers=1, worker_init_fn=open_file)
    assert epoch == [["opened by 0", "opened by 0"]]


def seed_alike(worker: int) -> None:
    seed_generators(worker)


def test_what_a_worker_seeds_itself_changes_nothing() -> None:
    assert seen(Augmented(), num_workers=2, worker_init_fn=seed_alike) == seen(Augmented())


def test_the_data_set_inside_is_read_through() -> None:
    inside = Augmented()
    dataset: Any = SeededDataset(inside, seed=1)
    assert len(dataset) == dataset.size == 10
    dataset.size = 4
    assert inside.size == 4
    with pytest.raises(AttributeError, match="sise"):
        _ = dataset.sise
    again = pickle.loads(pickle.dumps(dataset))
    assert (type(again), again.size) == (SeededDataset, 4)
    index = EpochIndex.of(2)(3)
    assert again[index] == dataset[index] == copy.deepcopy(dataset)[index]
    assert not hasattr(dataset, "set_epoch")


def test_a_plain_index_is_not_seeded() -> None:
    dataset = SeededDataset(Augmented(), seed=1)
    seed_generators(3)
    first = dataset[2]
    assert dataset[2] != first
    assert len(dataset.__getitems__([1, 2])) == len(SeededDataset(Batched(), 1).__getitems__([1, 2])) == 2


@pytest.mark.parametrize(
    ("dataset", "is_plain"),
    [
        ([1, 2], True),
        (TensorDataset(torch.arange(3)), True),
        (Subset(TensorDataset(torch.arange(3)), [0]), True),
        (ConcatDataset([TensorDataset(torch.arange(3))]), True),
        (Subset(Augmented(), [0]), False),
        (ConcatDataset([TensorDataset(torch.arange(3)), Augmented()]), False),
        (type("Mine", (TensorDataset,), {})(torch.arange(3)), False),
    ],
)
def test_data_sets_that_only_look_something_up_are_left_as_they_are(dataset: Any, is_plain: bool) -> None:
    loader: DataLoader[Any] = DataLoader(dataset)
    assert draws_nothing(dataset, loader.collate_fn) is is_plain
    assert (prepare_data_loader(loader).dataset is dataset) is is_plain
    assert not draws_nothing(dataset, as_list)


def test_seeding_costs_some_microseconds() -> None:
    """`torch.manual_seed` alone takes a quarter of a millisecond."""
    seconds = min(timeit.repeat(lambda: seed_generators(123456789012345), number=100, repeat=20)) / 100
    assert seconds < 100e-6
