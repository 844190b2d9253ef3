"""Virtual epochs: data that go on from epoch to epoch, and runs over them that are resumed anywhere."""

import random
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dengine import Engine, Events, distributed

LENGTH, BATCH = 11, 2
PER_PASS = 6
ITERATIONS = 20

Trace = list[tuple[Any, ...]]


class Augmented(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), torch.rand(()).item(), random.random()])


class Stream(IterableDataset[torch.Tensor]):
    """Shuffles by epoch, and draws."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(LENGTH):
            yield torch.tensor([float((index + 3 * self.epoch) % LENGTH), torch.rand(()).item()])


class Restarting:
    """An iterator that restarts by itself after its end, as DALI's do. Its order depends on its passes."""

    def __init__(self) -> None:
        self._pass, self._next = 0, 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __len__(self) -> int:
        return PER_PASS

    def __next__(self) -> int:
        if self._next == PER_PASS:
            self._pass, self._next = self._pass + 1, 0
            raise StopIteration
        self._next += 1
        return 100 * self._pass + self._next


class Counting:
    """Data without a length that count their passes themselves."""

    def __init__(self) -> None:
        self.num_passes = 0

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        self.num_passes += 1
        return ((self.num_passes, number, random.random()) for number in range(PER_PASS))


def plain(**options: Any) -> Any:
    return DataLoader(Augmented(), batch_size=BATCH, shuffle=True, **options)


def prepared(dataset: Any = None, **options: Any) -> Any:
    shuffle = not isinstance(dataset, Stream)
    loader = DataLoader(dataset or Augmented(), batch_size=BATCH, shuffle=shuffle, **options)
    return distributed.prepare_data_loader(loader, seed=5)


WORKERS = {"num_workers": 2}
PERSISTENT = {"num_workers": 2, "persistent_workers": True}
KINDS: dict[str, Callable[[], Any]] = {
    "list": lambda: list(range(PER_PASS)),
    "counting": Counting,
    "generator": lambda: (random.random() for _ in range(1000)),
    "restarting": Restarting,
    "plain": plain,
    "prepared": prepared,
    "stream": lambda: DataLoader(Stream(), batch_size=BATCH),
    "prepared stream": lambda: prepared(Stream()),
}
WITH_WORKERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: plain(**WORKERS),
    "prepared": lambda: prepared(**WORKERS),
    "prepared, persistent": lambda: prepared(**PERSISTENT),
    "prepared stream": lambda: prepared(Stream(), **WORKERS),
}


def run(
    data: Any, epoch_length: int, *, saved: Any = None, save_at: int = 0, joined: bool = False
) -> tuple[Trace, Any]:
    """What an engine does and draws from `saved` on; and its state, at iteration `save_at` or an epoch's end (< 0)."""
    trace: Trace = []
    states: list[Any] = []

    def step(engine: Engine, batch: Any) -> None:
        state = engine.state
        shown = batch.tolist() if isinstance(batch, torch.Tensor) else batch
        trace.append((state.iteration, state.epoch, state.data_pass, state.pass_iteration, shown, random.random()))
        torch.rand(())

    def save(engine: Engine) -> None:
        states.append(deepcopy((engine.state_dict(), engine.random_state())))

    engine = Engine(step, joined=joined)
    engine.on(Events.EPOCH_STARTED | Events.EPOCH_COMPLETED, lambda engine: trace.append((torch.rand(()).item(),)))
    if save_at > 0:
        engine.on(Events.ITERATION_COMPLETED(once=save_at), save)
    elif save_at < 0:
        engine.on(Events.EPOCH_COMPLETED(once=-save_at), save)
    random.seed(0)
    torch.manual_seed(0)
    if saved is not None:
        engine.load_state_dict(saved[0])
        engine.load_random_state(saved[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.run(data, max_epochs=None, max_iterations=ITERATIONS, epoch_length=epoch_length, continue_data=True)
    return trace, states and states[0]


def of_iterations(trace: Trace) -> Trace:
    return [entry for entry in trace if len(entry) > 1]


@pytest.mark.parametrize("epoch_length", [2, 4, 6, 9, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_anywhere_is_the_one_never_interrupted(kind: str, epoch_length: int) -> None:
    make = KINDS[kind]
    whole, _ = run(make(), epoch_length)
    passes = [each[2:4] for each in of_iterations(whole)]
    if kind != "generator":
        assert passes == [(number // PER_PASS, number % PER_PASS + 1) for number in range(ITERATIONS)]
    for save_at in [*range(1, ITERATIONS), *range(-(ITERATIONS // epoch_length), 0)]:
        first, saved = run(make(), epoch_length, save_at=save_at)
        assert first == whole
        rest, _ = run(make(), epoch_length, saved=saved)
        assert rest == whole[len(whole) - len(rest) :], save_at
        done = save_at if save_at > 0 else -save_at * epoch_length
        assert len(of_iterations(rest)) == ITERATIONS - done


@pytest.mark.parametrize(("kind", "save_at"), [(kind, at) for kind in WITH_WORKERS for at in (3, 6, 7, -1, -2)])
def test_with_workers_too(kind: str, save_at: int) -> None:
    make = WITH_WORKERS[kind]
    whole, saved = run(make(), 4, save_at=save_at)
    rest, _ = run(make(), 4, saved=saved)
    assert rest == whole[len(whole) - len(rest) :]


@pytest.mark.parametrize("kind", ["prepared", "prepared stream"])
def test_samples_come_once_a_pass_in_the_order_of_epochs_that_are_whole(kind: str) -> None:
    batches: list[Any] = []
    wanted = Engine(lambda engine, batch: batches.append(batch.tolist()))
    wanted.run(KINDS[kind](), max_epochs=4, max_iterations=ITERATIONS)
    found, _ = run(KINDS[kind](), 4)
    assert [entry[4] for entry in of_iterations(found)] == batches
    once = sorted(sample[0] for batch in batches[PER_PASS : 2 * PER_PASS] for sample in batch)
    assert once == [float(number) for number in range(LENGTH)]


def test_the_workers_go_on_over_the_end_of_an_epoch() -> None:
    class Counted(DataLoader[Any]):
        num_iterators = 0

        def __iter__(self) -> Any:
            Counted.num_iterators += 1
            return super().__iter__()

    Engine(lambda engine, batch: None).run(
        Counted(Augmented(), batch_size=BATCH, num_workers=1), max_epochs=6, epoch_length=2, continue_data=True
    )
    assert Counted.num_iterators == 2


@pytest.mark.parametrize("is_prepared", [False, True])
def test_an_evaluation_over_the_same_loader_leaves_its_workers_alone(is_prepared: bool) -> None:
    data: Any = DataLoader(range(10), batch_size=2, num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    loader: Any = distributed.prepare_data_loader(data) if is_prepared else data
    found: list[int] = []
    trainer = Engine(lambda engine, batch: found.extend(batch.tolist()))
    evaluator = Engine(lambda engine, batch: None)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(loader) and None)
    trainer.run(loader, max_epochs=4, epoch_length=3, continue_data=True)
    assert found == [*range(10), *range(10), *range(4)]


@pytest.mark.parametrize("save_at", [3, 4, -1, 9])
def test_a_resumed_run_may_have_another_epoch_length(save_at: int) -> None:
    whole, saved = run(prepared(), 4, save_at=save_at)
    rest, _ = run(prepared(), 3, saved=saved)
    found = [entry[4] for entry in of_iterations(rest)]
    assert found == [entry[4] for entry in of_iterations(whole)][-len(found) :]
    assert len(found) == ITERATIONS - (save_at if save_at > 0 else 4)


def test_epochs_may_be_continued_from_a_resume_on() -> None:
    first = Engine(lambda engine, batch: None)
    first.run([0, 1, 2, 3], max_epochs=3, max_iterations=10)
    found: list[Any] = []
    second = Engine(lambda engine, batch: found.append((engine.state.data_pass, batch)))
    second.load_state_dict(first.state_dict())
    second.run([0, 1, 2, 3], max_epochs=5, epoch_length=3, continue_data=True)
    assert found == [(2, 2), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3), (4, 0)]


def test_a_run_over_continued_data_is_not_resumed_without() -> None:
    first, second = Engine(lambda engine, batch: None), Engine(lambda engine, batch: batch)
    first.run([0, 1, 2], max_epochs=2, epoch_length=2, continue_data=True)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="continue_data was True and is False: pass continue_data=True"):
        second.run([0, 1, 2], max_epochs=3, epoch_length=2)
    assert second.run([0, 1, 2], max_epochs=3, epoch_length=2, allow_changed_data=True).output == 1


def test_an_epoch_that_is_left_throws_no_batch_away() -> None:
    found: list[int] = []
    engine = Engine(lambda engine, batch: found.append(batch))
    engine.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate_epoch())
    engine.run(range(5), max_epochs=3, epoch_length=3, continue_data=True)
    assert found == [0, 1, 2, 3, 4, 0, 1, 2]


def test_a_second_run_starts_at_the_beginning_of_the_first_pass() -> None:
    engine = Engine(lambda engine, batch: (engine.state.data_pass, batch))
    for _ in range(2):
        state = engine.run([0, 1, 2], max_epochs=2, epoch_length=2, continue_data=True)
        assert (state.output, state.data_pass, state.pass_iteration) == ((1, 0), 1, 1)
    assert engine.run([0, 1, 2], max_epochs=2).data_pass == 1


def test_data_that_run_dry_say_so() -> None:
    with pytest.raises(RuntimeError, match="ran dry in epoch 1 after 3 iterations"):
        Engine(lambda engine, batch: None).run(iter([1, 2, 3]), max_epochs=3, epoch_length=2, continue_data=True)


def test_bad_input_is_named_with_the_way_out() -> None:
    engine: Any = Engine(lambda engine, batch: None)
    with pytest.raises(ValueError, match="needs the iterations of an epoch: pass epoch_length="):
        engine.run([1], continue_data=True)
    with pytest.raises(TypeError, match="continue_data='yes' must be True or False"):
        engine.run([1], epoch_length=1, continue_data="yes")
    exact: Any = distributed.prepare_data_loader(DataLoader(range(5)), exact=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"exact=True.*To evaluate, leave epoch_length= and continue_data= out"):
        engine.run(exact, epoch_length=2, continue_data=True)
    Engine(lambda engine, batch: None, joined=True).run(exact, epoch_length=2, continue_data=True)
