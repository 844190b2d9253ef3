"""Any iterable as data: how long an epoch is, when it is iterated again, and who is told the epoch."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from dengine import Engine, Events


def batches_of(data: Any, **options: Any) -> list[list[Any]]:
    """The batches of each epoch of a run."""
    engine = Engine(lambda engine, batch: batch)
    epochs: list[list[Any]] = []
    engine.on(Events.EPOCH_STARTED, lambda engine: epochs.append([]))
    engine.on(Events.ITERATION_COMPLETED, lambda engine: epochs[-1].append(engine.state.output))
    engine.run(data, **options)
    return epochs


class Unsized:
    """Iterates anew each time, and tells no length."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = list(lengths)

    def __iter__(self) -> Iterator[int]:
        length = self.lengths[0] if len(self.lengths) == 1 else self.lengths.pop(0)
        yield from range(length)


class Indexed:
    """The sequence protocol without __iter__."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index >= 3:
            raise IndexError
        return index


class SelfResetting:
    """Its own iterator, which begins anew at each iter(): as prefetchers and DALI's iterators do."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> "SelfResetting":
        self.position = 0
        return self

    def __next__(self) -> int:
        if self.position == self.length:
            raise StopIteration
        self.position += 1
        return self.position - 1


class Claims:
    """Says one length and has another."""

    def __init__(self, claimed: int, actual: int) -> None:
        self.claimed, self.actual = claimed, actual

    def __len__(self) -> int:
        return self.claimed

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.actual))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


# -- every kind of iterable --------------------------------------------------------------------------------------

RESTARTABLE: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1, 2],
    "tuple": lambda: (0, 1, 2),
    "range": lambda: range(3),
    "dict": lambda: {0: "a", 1: "b", 2: "c"},
    "unsized": lambda: Unsized(3),
    "sequence protocol": Indexed,
    "its own iterator": lambda: SelfResetting(3),
    "shorter than it says": lambda: Claims(10, 3),
    "longer than it says": lambda: Claims(3, 10),
    "tensor": lambda: torch.arange(3),
    "loader": lambda: DataLoader([0, 1, 2], batch_size=None),  # type: ignore[arg-type]
    "loader over a stream": lambda: DataLoader(Unsizing(), batch_size=None),
}


class Unsizing(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize("make", RESTARTABLE.values(), ids=RESTARTABLE)
def test_each_epoch_iterates_over_the_data_anew(make: Callable[[], Any]) -> None:
    assert batches_of(make(), max_epochs=3) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("make", RESTARTABLE.values(), ids=RESTARTABLE)
def test_a_shorter_epoch_length_takes_the_first_batches_of_each_epoch(make: Callable[[], Any]) -> None:
    assert batches_of(make(), max_epochs=3, epoch_length=2) == [[0, 1]] * 3


@pytest.mark.parametrize("make", RESTARTABLE.values(), ids=RESTARTABLE)
def test_a_longer_epoch_length_iterates_over_the_data_again(make: Callable[[], Any]) -> None:
    if isinstance(make(), Claims) and make().actual == 10:
        assert batches_of(make(), epoch_length=11) == [[*range(10), 0]]
    else:
        assert batches_of(make(), max_epochs=2, epoch_length=7) == [[0, 1, 2, 0, 1, 2, 0]] * 2


@pytest.mark.parametrize("make", RESTARTABLE.values(), ids=RESTARTABLE)
def test_max_iterations_may_end_any_data_anywhere(make: Callable[[], Any]) -> None:
    length = len(batches_of(make())[0])
    for max_iterations in range(1, 2 * length + 2):
        epochs = batches_of(make(), max_epochs=None, max_iterations=max_iterations)
        assert sum(epochs, []) == [index % length for index in range(max_iterations)]


def test_data_whose_length_changes_from_epoch_to_epoch_is_taken_as_it_comes() -> None:
    epochs = batches_of(Unsized(2, 4, 1), max_epochs=3)
    assert epochs == [[0, 1], [0, 1, 2, 3], [0]]


# -- one-shot iterators ------------------------------------------------------------------------------------------


def stream(length: int) -> Iterator[int]:
    yield from range(length)


def test_a_one_shot_iterator_that_suffices_goes_on_where_it_is() -> None:
    assert batches_of(stream(6), max_epochs=3, epoch_length=2) == [[0, 1], [2, 3], [4, 5]]


def test_a_one_shot_iterator_is_asked_for_no_batch_too_many() -> None:
    data = stream(10)
    batches_of(data, max_epochs=2, epoch_length=2)
    assert next(data) == 4


@pytest.mark.parametrize("end", ["terminate", "terminate_epoch"])
def test_a_one_shot_iterator_that_was_left_early_loses_no_batch(engine: Engine, end: str) -> None:
    data = stream(10)
    engine.on(Events.ITERATION_COMPLETED(once=2), lambda engine: getattr(engine, end)())
    engine.run(data, epoch_length=5)
    assert next(data) == 2


def test_one_epoch_of_a_generator_needs_no_length() -> None:
    assert batches_of(stream(3)) == [[0, 1, 2]]


@pytest.mark.parametrize("make", [stream, lambda length: iter(range(length)), lambda length: map(int, range(length))])
@pytest.mark.parametrize(
    ("options", "num_iterations", "epoch"),
    [
        ({"max_epochs": 2}, 5, 1),
        ({"max_epochs": 1, "epoch_length": 6}, 5, 0),
        ({"max_epochs": 2, "epoch_length": 5}, 5, 1),
        ({"max_epochs": 3, "epoch_length": 2}, 5, 2),
        ({"max_epochs": None, "max_iterations": 6}, 5, 1),
    ],
)
def test_a_one_shot_iterator_that_runs_dry_says_so_and_what_to_pass(
    engine: Engine, make: Callable[[int], Any], options: dict[str, Any], num_iterations: int, epoch: int
) -> None:
    data = make(5)
    with pytest.raises(RuntimeError, match="ran dry") as raised:
        engine.run(data, **options)
    message = str(raised.value)
    assert f"{num_iterations} iterations" in message
    assert type(data).__name__ in message
    assert "DataLoader" in message
    assert "epoch_length" in message
    assert (engine.state.iteration, engine.state.epoch) == (num_iterations, epoch)


def test_a_one_shot_iterator_that_ran_dry_fires_no_event_of_a_batch_that_never_came(
    engine: Engine, recorded: Callable[[Engine], Any]
) -> None:
    log = recorded(engine)
    with pytest.raises(RuntimeError, match="ran dry"):
        engine.run(stream(1), max_epochs=2)
    assert [name for name, _, _ in log] == [
        "STARTED",
        "EPOCH_STARTED",
        "GET_BATCH_STARTED",
        "GET_BATCH_COMPLETED",
        "ITERATION_STARTED",
        "ITERATION_COMPLETED",
        "GET_BATCH_STARTED",
        "EPOCH_COMPLETED",
        "EPOCH_STARTED",
        "GET_BATCH_STARTED",
        "EXCEPTION_RAISED",
    ]


def test_an_infinite_iterator_is_ended_by_epoch_length_max_iterations_or_terminate() -> None:
    assert batches_of(count(), max_epochs=2, epoch_length=3) == [[0, 1, 2], [3, 4, 5]]
    assert batches_of(count(), max_iterations=4) == [[0, 1, 2, 3]]
    engine = Engine(lambda engine, batch: engine.terminate() if batch == 41 else None)
    assert engine.run(count()).iteration == 42


def test_the_same_generator_may_go_on_in_a_second_run(engine: Engine) -> None:
    data = stream(10)
    engine.run(data, epoch_length=4)
    assert engine.run(data, epoch_length=4).output == 7
    assert engine.state.iteration == 4


# -- no batch at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"epoch_length": 3}, {"max_epochs": 3}])
@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda: stream(0),
        lambda: iter([]),
        lambda: Unsized(0),
        lambda: Claims(5, 0),
        lambda: DataLoader([], batch_size=2),  # type: ignore[arg-type]
        lambda: DataLoader([1], batch_size=2, drop_last=True),  # type: ignore[arg-type]
    ],
)
def test_data_without_a_batch_is_a_value_error(
    engine: Engine, make: Callable[[], Any], options: dict[str, Any]
) -> None:
    called: list[int] = []
    engine.on(Events.ITERATION_STARTED | Events.EPOCH_COMPLETED | Events.COMPLETED, lambda engine: called.append(1))
    with pytest.raises(ValueError, match="no batch"):
        engine.run(make(), **options)
    assert called == []
    assert engine.run([1]).iteration == 1


def test_data_that_cannot_begin_anew_is_a_runtime_error_in_the_second_epoch(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="no batch in epoch 1"):
        engine.run(Unsized(2, 0), max_epochs=2)


# -- errors of the data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk"), TypeError("mine"), KeyboardInterrupt(), GeneratorExit()])
def test_what_the_data_raises_is_raised_by_run(engine: Engine, error: BaseException) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise error

    reported: list[BaseException | None] = []
    engine.on(Events.EXCEPTION_RAISED, lambda engine: reported.append(engine.state.exception))
    with pytest.raises(type(error)) as raised:
        engine.run(broken())
    assert raised.value is error
    assert reported == [error]
    assert engine.run([1, 2]).iteration == 2


def test_what_iter_and_len_raise_is_raised_by_run(engine: Engine) -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("disk")

    class BrokenLength(Unsized):
        def __len__(self) -> int:
            raise OSError("length")

    with pytest.raises(OSError, match="disk"):
        engine.run(Broken())
    with pytest.raises(OSError, match="length"):
        engine.run(BrokenLength(3))
    assert engine.run([1, 2]).iteration == 2


# -- set_epoch ---------------------------------------------------------------------------------------------------


class Told:
    """Whatever has a `set_epoch`."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class ToldSampler(Told, Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))

    def __len__(self) -> int:
        return 4


class ToldBatchSampler(Told, Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2, 3]])

    def __len__(self) -> int:
        return 2


class ToldStream(Told, IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class ToldData(Told):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def with_sampler() -> tuple[Any, Told]:
    sampler = ToldSampler()
    return DataLoader(range(4), sampler=sampler, batch_size=2), sampler  # type: ignore[arg-type]


def with_batch_sampler() -> tuple[Any, Told]:
    sampler = ToldBatchSampler()
    return DataLoader(range(4), batch_sampler=sampler), sampler  # type: ignore[arg-type]


def with_sampler_in_batch_sampler() -> tuple[Any, Told]:
    sampler = ToldSampler()
    return DataLoader(range(4), batch_sampler=BatchSampler(sampler, 2, False)), sampler  # type: ignore[arg-type]


def with_stream() -> tuple[Any, Told]:
    dataset = ToldStream()
    return DataLoader(dataset, batch_size=2), dataset


def with_data() -> tuple[Any, Told]:
    data = ToldData()
    return data, data


MAKE_TOLD = [with_sampler, with_batch_sampler, with_sampler_in_batch_sampler, with_stream, with_data]


@pytest.mark.parametrize("make", MAKE_TOLD)
def test_whoever_has_set_epoch_is_told_each_epoch_once(engine: Engine, make: Callable[[], tuple[Any, Told]]) -> None:
    data, told = make()
    engine.run(data, max_epochs=3)
    assert told.epochs == [0, 1, 2]


@pytest.mark.parametrize("make", MAKE_TOLD)
def test_a_resumed_run_tells_the_epoch_it_goes_on_in(engine: Engine, make: Callable[[], tuple[Any, Told]]) -> None:
    data, told = make()
    engine.on(Events.ITERATION_COMPLETED, lambda engine: engine.state.epoch == 1 and engine.terminate())
    resumed = Engine(lambda engine, batch: None)
    engine.run(data, max_epochs=3)
    resumed.load_state_dict(engine.state_dict())
    told.epochs.clear()
    resumed.run(data, max_epochs=3)
    assert told.epochs == [1, 2]


def test_the_epoch_is_told_before_the_first_batch_is_asked_for() -> None:
    class Ordered(ToldData):
        def __iter__(self) -> Iterator[int]:
            return iter([self.epochs[-1]])

    assert batches_of(Ordered(), max_epochs=3) == [[0], [1], [2]]


def test_a_distributed_sampler_shuffles_differently_in_each_epoch() -> None:
    dataset = TensorDataset(torch.arange(32))
    sampler = DistributedSampler(dataset, num_replicas=2, rank=1)
    epochs = batches_of(DataLoader(dataset, sampler=sampler, batch_size=16), max_epochs=3)
    orders = [tuple(batch[0].tolist()) for (batch,) in epochs]
    assert len(set(orders)) == 3
    sampler.set_epoch(1)
    assert list(sampler) == list(orders[1])


def test_a_set_epoch_that_is_no_method_is_left_alone() -> None:
    class Odd(Unsized):
        set_epoch = None

    assert batches_of(Odd(2)) == [[0, 1]]


# -- DataLoader --------------------------------------------------------------------------------------------------


class Squares(Dataset[int]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> int:
        return index**2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_persistent", [False, True])
def test_a_data_loader_is_data(num_workers: int, is_persistent: bool) -> None:
    loader = DataLoader(
        Squares(), batch_size=3, num_workers=num_workers, persistent_workers=is_persistent and num_workers > 0
    )
    epochs = batches_of(loader, max_epochs=2)
    assert [[batch.tolist() for batch in epoch] for epoch in epochs] == [[[0, 1, 4], [9, 16, 25], [36]]] * 2


def test_a_shuffling_loader_gives_each_sample_once_an_epoch() -> None:
    for epoch in batches_of(DataLoader(range(10), batch_size=3, shuffle=True), max_epochs=2):  # type: ignore[arg-type]
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))


def test_a_loader_over_a_stream_has_no_length_and_needs_none() -> None:
    epochs = batches_of(DataLoader(Stream(), batch_size=2), max_epochs=2)
    assert [[batch.tolist() for batch in epoch] for epoch in epochs] == [[[0, 1], [2, 3], [4]]] * 2


# -- resuming in the middle of an epoch --------------------------------------------------------------------------


def resumed_batches(data: Any, state_dict: dict[str, Any], **options: Any) -> list[Any]:
    engine = Engine(lambda engine, batch: batch)
    engine.load_state_dict(state_dict)
    batches: list[Any] = []
    engine.on(Events.ITERATION_COMPLETED, lambda engine: batches.append(engine.state.output))
    engine.run(data, **options)
    return batches


def position(iteration: int, epoch_length: int, num_batches: int | None = None) -> dict[str, Any]:
    """The state dict taken in the last handler of that iteration, over data of `epoch_length` batches if not told."""
    engine = Engine(lambda engine, batch: batch)
    taken: list[dict[str, Any]] = []
    engine.on(Events.ITERATION_COMPLETED(once=iteration), lambda engine: taken.append(engine.state_dict()))
    engine.run(range(num_batches or epoch_length), max_epochs=9, epoch_length=epoch_length)
    return taken[0]


RESUMABLE: dict[str, Callable[[], Any]] = {
    **{name: make for name, make in RESTARTABLE.items() if "says" not in name and "own" not in name},
    "one-shot, given anew": lambda: iter([0, 1, 2] * 3),
}


@pytest.mark.parametrize("iteration", range(1, 9))
@pytest.mark.parametrize("make", RESUMABLE.values(), ids=RESUMABLE)
def test_a_resumed_run_takes_the_batches_that_are_left(make: Callable[[], Any], iteration: int) -> None:
    left = resumed_batches(make(), position(iteration, 3), max_epochs=3, epoch_length=3)
    assert left == ([0, 1, 2] * 3)[iteration:]


@pytest.mark.parametrize("iteration", range(1, 14))
@pytest.mark.parametrize("make", [lambda: [0, 1, 2], lambda: Unsized(3), Indexed])
def test_a_resumed_run_in_an_epoch_longer_than_the_data_takes_the_batches_that_are_left(
    make: Callable[[], Any], iteration: int
) -> None:
    left = resumed_batches(make(), position(iteration, 7, 3), max_epochs=2, epoch_length=7)
    assert left == ([0, 1, 2, 0, 1, 2, 0] * 2)[iteration:]


def test_a_sampler_that_can_skip_is_asked_to_and_no_sample_is_loaded_in_vain() -> None:
    class Skipping(Sampler[int]):
        skipped = 0

        def skip(self, num_samples: int) -> None:
            self.skipped = num_samples

        def __iter__(self) -> Iterator[int]:
            start, self.skipped = self.skipped, 0
            return iter(range(start, 12))

        def __len__(self) -> int:
            return 12

    class Counting(Dataset[int]):
        loaded: list[int]

        def __init__(self) -> None:
            self.loaded = []

        def __getitem__(self, index: int) -> int:
            self.loaded.append(index)
            return index

    dataset = Counting()
    loader = DataLoader(dataset, sampler=Skipping(), batch_size=3)
    left = resumed_batches(loader, position(6, 4), max_epochs=2)
    assert [batch.tolist() for batch in left] == [[6, 7, 8], [9, 10, 11]]
    assert dataset.loaded == list(range(6, 12))


def test_a_seeded_shuffling_loader_resumes_in_the_same_order() -> None:
    def loader() -> Any:
        generator = torch.Generator().manual_seed(7)
        sampler = RandomSampler(range(8), generator=generator)
        return DataLoader(range(8), batch_size=2, sampler=sampler)  # type: ignore[arg-type]

    full = torch.cat(batches_of(loader(), max_epochs=1)[0])
    left = torch.cat(resumed_batches(loader(), position(2, 4), max_epochs=1))
    assert torch.equal(left, full[4:])
