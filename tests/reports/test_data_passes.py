"""A prepared loader that nobody tells the epoch goes on by itself, and a resumed run finds it where it was."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from dengine import Engine, Events
from dengine.distributed import ElasticSampler, prepare_data_loader
from dengine.handlers import Checkpoint

LENGTH = 8


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        return index, random.random()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(LENGTH).tolist():
            yield index, random.random()


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def prepared(dataset: Any = None, **options: Any) -> Any:
    dataset = Augmented() if dataset is None else dataset
    shuffle = None if isinstance(dataset, IterableDataset) else True
    loader: Any = DataLoader(dataset, batch_size=2, shuffle=shuffle, collate_fn=as_list, **options)
    return prepare_data_loader(loader, seed=3)


class Wrapper:
    """As anybody writes one."""

    def __init__(self, *loaders: Any) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[Any]:
        yield from zip(*self.loaders, strict=True)


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def told() -> list[list[Any]]:
    """The oracle: what an engine that sees the loader gets in each epoch."""
    return epochs_of(prepared(), 4)


def epochs_of(data: Any, num_epochs: int, **options: Any) -> list[list[Any]]:
    epochs: list[list[Any]] = []
    engine = Engine(lambda engine, batch: epochs[-1].append(batch))
    engine.on(Events.EPOCH_STARTED, lambda engine: epochs.append([]))
    engine.run(data, max_epochs=num_epochs, **options)
    return epochs


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("kind", [Augmented, Stream])
def test_each_pass_of_a_loader_that_nobody_tells_is_of_the_next_epoch(kind: Any, options: dict[str, Any]) -> None:
    if kind is Stream and options.get("num_workers") == 2:
        options = {"num_workers": 1, "persistent_workers": True}  # each worker would read all of it
    expected = epochs_of(prepared(kind(), **options), 3)
    loader = prepared(kind(), **options)
    assert [list(loader) for _ in range(3)] == expected
    assert len({repr(epoch) for epoch in expected}) == 3


@pytest.mark.parametrize(
    "wrap", [lambda loader: tqdm(loader, disable=True), Wrapper, lambda loader: Wrapper(loader, prepared())]
)
def test_a_loader_inside_anything_has_another_order_in_each_epoch(wrap: Callable[[Any], Any]) -> None:
    found = epochs_of(wrap(prepared()), 4)
    plain = [[batch[0] if isinstance(batch, tuple) else batch for batch in epoch] for epoch in found]
    assert plain == told()


def test_iterating_in_a_step_goes_on_with_each_pass() -> None:
    loader = prepared()
    passes: list[Any] = []
    Engine(lambda engine, batch: passes.append(list(loader))).run(range(4))
    assert passes == told()


def test_an_epoch_that_is_told_counts_and_the_next_pass_goes_on_from_it() -> None:
    expected = told()
    loader = prepared()
    assert epochs_of(loader, 2) == expected[:2]
    assert list(loader) == expected[2]
    assert epochs_of(loader, 1) == expected[:1]  # a fresh run over the loader itself begins in epoch 0
    loader.sampler.set_epoch(3)
    assert list(loader) == expected[3]
    assert len(loader) == 4


def test_an_epoch_longer_than_a_told_loader_passes_over_the_same_order_again() -> None:
    (epoch,) = epochs_of(prepared(), 1, epoch_length=8)
    assert epoch == 2 * told()[0]


def test_an_abandoned_pass_counts_and_two_iterators_at_a_time_have_an_order_each() -> None:
    expected = told()
    loader = prepared()
    next(iter(loader))
    assert list(loader) == expected[1]
    one, other = iter(loader), iter(loader)
    first, second = [next(one)], [next(other)]
    assert ([*first, *one], [*second, *other]) == (expected[2], expected[3])


@pytest.mark.parametrize("kind", [Augmented, Stream])
def test_two_iterators_with_workers_have_an_epoch_each(kind: Any) -> None:
    expected = epochs_of(prepared(kind()), 2)
    loader = prepared(kind(), num_workers=1)
    one, other = iter(loader), iter(loader)
    assert [list(one), list(other)] == expected


def test_an_evaluation_is_in_one_order_every_time() -> None:
    loader: Any = prepare_data_loader(DataLoader(Augmented(), collate_fn=as_list), exact=True)
    assert epochs_of(loader, 1) == epochs_of(loader, 1)


class Growing(Dataset[int]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 + 2 * self.epoch

    def __getitem__(self, index: int) -> tuple[int, int]:  # type: ignore[override]
        return index, self.epoch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_hears_of_an_epoch_that_nobody_told(num_workers: int) -> None:
    loader: Any = DataLoader(
        Growing(), collate_fn=as_list, num_workers=num_workers, persistent_workers=num_workers == 1
    )
    prepared = prepare_data_loader(loader)
    assert [{batch[0][1] for batch in prepared} for _ in range(3)] == [{0}, {1}, {2}]
    assert [len(list(prepared)) for _ in range(2)] == [8, 10]


def test_a_sampler_of_a_plain_loader_goes_on_too() -> None:
    loader = DataLoader(range(9), sampler=ElasticSampler(range(9)))  # type: ignore[arg-type]
    assert len({repr([int(sample) for sample in loader]) for _ in range(3)}) == 3


# -- resumed -----------------------------------------------------------------------------------------------------

WRAPPED: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "tqdm": lambda: (tqdm(prepared(), disable=True), {}),
    "zip": lambda: (Wrapper(prepared(), prepared(Stream())), {}),
    "workers": lambda: (Wrapper(prepared(num_workers=1, persistent_workers=True)), {}),
    "longer epochs": lambda: (Wrapper(prepared()), {"epoch_length": 6}),
    "shorter epochs": lambda: (Wrapper(prepared()), {"epoch_length": 3}),
    "generator": lambda: (endless(prepared()), {"epoch_length": 3}),
    "told": lambda: (prepared(), {}),
}


def logged(data: Any, log: list[Any], **options: Any) -> Engine:
    """An engine whose step iterates over a second loader, too."""
    inner = prepared(Stream())

    def step(engine: Engine, batch: Any) -> None:
        log.append((engine.state.iteration, batch, list(inner) if engine.state.iteration % 3 == 0 else None))

    return Engine(step)


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.EPOCH_STARTED])
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_a_run_resumed_anywhere_goes_on_with_the_passes_it_would_have_had(
    make: Callable[[], tuple[Any, dict[str, Any]]], event: Any
) -> None:
    whole: list[Any] = []
    data, options = make()
    trainer = logged(data, whole)
    states: list[Any] = []
    trainer.on(event, lambda engine: states.append((engine.state_dict(), engine.random_state())))
    trainer.run(data, max_epochs=3, **options)
    for position, generators in states[::2]:
        data, options = make()
        list(prepared())  # a script may look into its data before the run
        rest: list[Any] = []
        again = logged(data, rest)
        again.load_state_dict(position)
        again.load_random_state(generators)
        again.run(data, max_epochs=3, **options)
        assert rest == whole[position["iteration"] :], position


@pytest.mark.parametrize("iteration", [1, 5, 9])
def test_a_state_taken_before_the_first_step_of_an_epoch_is_of_the_same_pass(iteration: int) -> None:
    taken: list[Any] = []
    expected: list[Any] = []
    trainer = Engine(lambda engine, batch: expected.append(batch))
    trainer.on(
        Events.ITERATION_STARTED(once=iteration),
        lambda engine: taken.append((engine.state_dict(), engine.random_state())),
    )
    trainer.run(Wrapper(prepared()), max_epochs=3)
    again = Engine(lambda engine, batch: found.append(batch))
    found: list[Any] = []
    again.load_state_dict(taken[0][0])
    again.load_random_state(taken[0][1])
    again.run(Wrapper(prepared()), max_epochs=3)
    assert found == expected[iteration - 1 :]


def test_the_passes_travel_with_a_checkpoint(tmp_path: Path) -> None:
    def run(max_iterations: int, folder: Path) -> list[Any]:
        found: list[Any] = []
        trainer = Engine(lambda engine, batch: found.append(batch))
        trainer.on(Events.ITERATION_COMPLETED(once=max_iterations), Checkpoint({"trainer": trainer}, folder))
        data = Wrapper(prepared())
        Checkpoint.resume(folder, {"trainer": trainer})
        trainer.run(data, max_epochs=3, max_iterations=max_iterations)
        return found

    assert run(6, tmp_path / "parts") + run(12, tmp_path / "parts") == run(12, tmp_path / "whole")
