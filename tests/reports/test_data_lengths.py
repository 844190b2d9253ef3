"""Data that reset themselves, that cannot tell their length, and that have another one when a run is resumed."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events


class Resetting:
    """As DALI's iterators: begins anew at its StopIteration, not at iter()."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.position = self.num_passes = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> "Resetting":
        return self

    def __next__(self) -> tuple[int, int]:
        if self.position == self.length:
            self.position = 0
            self.num_passes += 1
            raise StopIteration
        self.position += 1
        return self.num_passes, self.position - 1


class ResettingAtIter(Resetting):
    def __iter__(self) -> "Resetting":
        self.num_passes += self.position > 0
        self.position = 0
        return self


class Slotted(Resetting):
    """Neither a hash nor weak references."""

    __slots__ = ()
    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return self is other


class Endless(Resetting):
    """Says how long an epoch is, and never stops."""

    def __next__(self) -> tuple[int, int]:
        self.position += 1
        return 0, self.position - 1


class Once(Resetting):
    """Says its length, and stays exhausted."""

    def __next__(self) -> tuple[int, int]:
        if self.position == self.length:
            raise StopIteration
        return super().__next__()


def batches_of(data: Any, **options: Any) -> list[list[Any]]:
    engine = Engine(lambda engine, batch: epochs[-1].append(batch))
    epochs: list[list[Any]] = []
    engine.on(Events.EPOCH_STARTED, lambda engine: epochs.append([]))
    engine.run(data, **options)
    return epochs


def passes(num_passes: int, length: int = 3, first: int = 0) -> list[list[tuple[int, int]]]:
    return [[(number, index) for index in range(length)] for number in range(first, first + num_passes)]


@pytest.mark.parametrize("kind", [Resetting, Slotted])
def test_each_epoch_over_an_iterator_that_resets_itself_is_whole(kind: Callable[[int], Any]) -> None:
    data = kind(3)
    assert batches_of(data, max_epochs=3) == passes(3)
    assert data.position == 0  # it was run to its StopIteration
    assert list(data) == passes(1, first=3)[0]


def test_each_evaluation_over_an_iterator_that_resets_itself_is_whole() -> None:
    data = Resetting(3)
    assert [batches_of(data)[0] for _ in range(4)] == passes(4)


@pytest.mark.parametrize("end", ["terminate", "terminate_epoch", "raise"])
@pytest.mark.parametrize("kind", [Resetting, ResettingAtIter, Slotted])
def test_an_evaluation_after_one_that_was_cut_short_is_whole(kind: Callable[[int], Any], end: str) -> None:
    data = kind(3)

    def leave(engine: Engine) -> None:
        if end == "raise":
            raise KeyError
        getattr(engine, end)()

    engine = Engine(lambda engine, batch: found.append(batch[1]))
    found: list[int] = []
    handle = engine.on(Events.ITERATION_COMPLETED(once=2), leave)
    if end == "raise":
        with pytest.raises(KeyError):
            engine.run(data)
    else:
        engine.run(data)
    handle.remove()
    assert found == [0, 1]
    if kind is not Slotted:  # whose place nobody can keep
        engine.run(data)
        assert found == [0, 1, 0, 1, 2]


def test_an_epoch_after_one_that_was_cut_short_is_whole() -> None:
    engine = Engine(lambda engine, batch: found.append(batch))
    found: list[Any] = []
    engine.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate_epoch())
    engine.run(Resetting(3), max_epochs=2)
    assert found == [(0, 0), (0, 1), *passes(1, first=1)[0]]


def test_a_longer_epoch_passes_over_it_again_and_a_shorter_one_goes_on_where_it_is() -> None:
    assert batches_of(Resetting(3), max_epochs=2, epoch_length=6) == [sum(passes(2), []), sum(passes(2, first=2), [])]
    in_order = sum(passes(4), [])
    for epoch_length in (2, 4, 5):
        found = batches_of(Resetting(3), max_epochs=2, epoch_length=epoch_length)
        assert sum(found, []) == in_order[: 2 * epoch_length]
    data = Resetting(4)
    assert sum(batches_of(data, max_epochs=3, epoch_length=2), []) == sum(passes(2, 4), [])[:6]


def test_an_endless_iterator_with_a_length_loses_no_batch_between_epochs_and_runs() -> None:
    data = Endless(3)
    assert batches_of(data, max_epochs=2) == [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)]]
    assert batches_of(data) == [[(0, 6), (0, 7), (0, 8)]]


def test_a_sized_iterator_that_stays_exhausted_ran_dry() -> None:
    with pytest.raises(RuntimeError, match="ran dry in epoch 1 after 3 iterations"):
        batches_of(Once(3), max_epochs=2)
    loader = DataLoader(range(3), batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="ran dry"):
        batches_of(iter(loader), max_epochs=2)


def test_an_empty_iterator_with_a_length_is_a_value_error() -> None:
    for data in (Resetting(0), iter(DataLoader([]))):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no batch"):
            batches_of(data)


@pytest.mark.parametrize("kind", [Resetting, ResettingAtIter])
@pytest.mark.parametrize("epoch_length", [None, 2, 6, 7])
def test_a_resumed_run_over_an_iterator_that_resets_itself_goes_on(kind: Any, epoch_length: int | None) -> None:
    expected = sum(batches_of(kind(3), max_epochs=3, epoch_length=epoch_length), [])
    trainer = Engine(lambda engine, batch: None)
    states: list[Any] = []
    trainer.on(
        Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED,
        lambda engine: states.append((engine.state_dict(), engine.random_state())),
    )
    trainer.run(kind(3), max_epochs=3, epoch_length=epoch_length)
    for position, generators in states:
        again = Engine(lambda engine, batch: found.append(batch))  # noqa: B023
        found: list[Any] = []
        again.load_state_dict(position)
        again.load_random_state(generators)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again.run(kind(3), max_epochs=3, epoch_length=epoch_length)
        assert found == expected[position["iteration"] :], position
        assert len(caught) <= 1


# -- lengths that raise ------------------------------------------------------------------------------------------


class Untold:
    """As Lightning's CombinedLoader: no length before iter()."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.is_begun = False

    def __len__(self) -> int:
        if not self.is_begun:
            raise self.error
        return 3

    def __iter__(self) -> Iterator[int]:
        self.is_begun = True
        return iter(range(3))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("call iter() first"), ValueError("num_steps"), AttributeError("x"), AssertionError(), KeyError("x")],
)
def test_a_length_that_raises_is_not_known_yet(error: Exception) -> None:
    data = Untold(error)
    engine = Engine(lambda engine, batch: None)
    assert engine.run(data, max_epochs=2).iteration == 6
    assert engine.state.epoch_length == 3


@pytest.mark.parametrize("length", [float("inf"), -1, 2**100])
def test_a_length_that_is_none_is_not_known(length: Any) -> None:
    class Odd(Untold):
        def __len__(self) -> int:
            return length

    assert batches_of(Odd(ValueError())) == [[0, 1, 2]]


def test_a_batch_sampler_without_a_length_makes_an_epoch_as_long_as_it_lasts() -> None:
    class Dynamic:  # as torch_geometric's DynamicBatchSampler
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0], [1, 2], [3]])

        def __len__(self) -> int:
            raise ValueError("The length is only known with num_steps")

    loader = DataLoader(range(4), batch_sampler=Dynamic())  # type: ignore[arg-type]
    assert [[batch.tolist() for batch in epoch] for epoch in batches_of(loader, max_epochs=2)] == [
        [[0], [1, 2], [3]]
    ] * 2


# -- another length ----------------------------------------------------------------------------------------------


def plain(num_samples: int, batch_size: int = 2) -> Any:
    return DataLoader(TensorDataset(torch.arange(num_samples)), batch_size=batch_size)


@pytest.mark.parametrize("iterations", [2, 3])  # in an epoch, and at its end
@pytest.mark.parametrize(
    ("data", "changed", "words"),
    [
        ([1, 2, 3], [1, 2, 3, 4], "the number of batches was 3 and is 4"),
        (range(3), range(2), "the number of batches was 3 and is 2"),
        (torch.arange(3), torch.arange(5), "the number of batches was 3 and is 5"),
        (plain(6), plain(8), "the number of batches was 3 and is 4"),
        (plain(6), plain(5), "the number of samples was 6 and is 5"),
        (plain(6), plain(12, 4), "the number of samples was 6 and is 12"),
        (plain(6), plain(6, 3), "the number of batches was 3 and is 2"),
        (Resetting(3), Resetting(4), "the number of batches was 3 and is 4"),
    ],
)
def test_sized_data_of_another_length_are_refused_unless_that_is_wanted(
    data: Any, changed: Any, words: str, iterations: int
) -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.run(data, max_iterations=iterations)
    again = Engine(lambda engine, batch: None)
    again.load_state_dict(trainer.state_dict())
    again.load_random_state(trainer.random_state())
    with pytest.raises(ValueError, match=words) as raised:
        again.run(changed, max_epochs=2)
    assert "allow_changed_data=True" in str(raised.value)
    again.run(changed, max_epochs=2, allow_changed_data=True)
    assert again.state.epoch == 1


def test_a_fresh_run_may_be_over_any_data() -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.run([1, 2, 3])
    assert trainer.run([1, 2]).iteration == 2


class Growing:
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 + self.epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))


def test_data_that_grow_by_the_epoch_are_the_same_data() -> None:
    states: list[Any] = []
    trainer = Engine(lambda engine, batch: None)
    trainer.on(
        Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED | Events.EPOCH_STARTED,
        lambda engine: states.append(engine.state_dict()),
    )
    trainer.run(Growing(), max_epochs=3)
    for state in states:
        again = Engine(lambda engine, batch: None)
        again.load_state_dict(state)
        assert again.run(Growing(), max_epochs=3).iteration == 9
