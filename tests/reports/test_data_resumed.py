"""Data that keep their own position or count their own epochs, and workers that outlive an epoch."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler
from tqdm import tqdm

from dengine import Engine, Events
from dengine.handlers import Checkpoint

LENGTH, EPOCHS = 7, 4


def shuffled(generator: random.Random) -> list[int]:
    order = list(range(LENGTH))
    generator.shuffle(order)
    return order


class Stateful:
    """As torchdata's loader: counts its epochs, and goes on from the position in its state."""

    def __init__(self) -> None:
        self.epoch = self.position = 0
        self.is_restored = False

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[int]:
        if not self.is_restored:
            self.position = 0
            self.epoch += 1
        self.is_restored = False
        order = shuffled(random.Random(self.epoch))
        while self.position < LENGTH:
            self.position += 1
            yield order[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.is_restored = True


class StatefulStream(Stateful, IterableDataset[int]):
    __len__ = None


def stream() -> tuple[Any, Any]:
    dataset = StatefulStream()
    return DataLoader(dataset, batch_size=None), dataset


def in_tqdm() -> tuple[Any, Any]:
    loader = Stateful()
    return tqdm(loader, disable=True), loader


def endless() -> tuple[Any, Any]:
    loader = Stateful()

    def batches() -> Iterator[int]:
        while True:
            yield from loader

    return batches(), loader


@pytest.mark.parametrize("iteration", [1, 6, 7, 13, 14, 15, 27])
@pytest.mark.parametrize("make", [lambda: (Stateful(),) * 2, stream, in_tqdm, endless])
def test_a_loader_restored_by_its_own_state_is_not_wound_forward_as_well(
    make: Callable[[], tuple[Any, Any]], iteration: int, tmp_path: Path
) -> None:
    def run(folder: Path, until: int) -> list[int]:
        data, loader = make()
        found: list[int] = []
        trainer = Engine(lambda engine, batch: found.append(int(batch)))
        objects = {"trainer": trainer, "loader": loader}
        trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint(objects, folder))
        Checkpoint.resume(folder, objects)
        trainer.run(data, max_epochs=EPOCHS, max_iterations=until, epoch_length=LENGTH)
        return found

    end = EPOCHS * LENGTH
    whole = run(tmp_path / "whole", end)
    assert len(whole) == end
    assert run(tmp_path / "parts", iteration) + run(tmp_path / "parts", end) == whole


def test_a_loader_restored_at_the_end_of_an_epoch_begins_the_next_one(tmp_path: Path) -> None:
    def run(folder: Path, num_epochs: int) -> list[int]:
        loader = Stateful()
        found: list[int] = []
        trainer = Engine(lambda engine, batch: found.append(batch))
        objects = {"trainer": trainer, "loader": loader}
        trainer.on(Events.EPOCH_COMPLETED, Checkpoint(objects, folder))
        Checkpoint.resume(folder, objects)
        trainer.run(loader, max_epochs=num_epochs)
        return found

    assert run(tmp_path / "parts", 2) + run(tmp_path / "parts", 4) == run(tmp_path / "whole", 4)


# -- counting their own epochs -----------------------------------------------------------------------------------


class CountsAtBegin:
    def __init__(self) -> None:
        self.epoch = -1

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(shuffled(random.Random(self.epoch)))

    def __len__(self) -> int:
        return LENGTH


class CountsAtEnd:
    def __init__(self) -> None:
        self._passes = 0

    def __iter__(self) -> Iterator[int]:
        yield from shuffled(random.Random(self._passes))
        self._passes += 1


class CountingStream(CountsAtBegin, IterableDataset[int]):
    __len__ = None


class CountingSampler(CountsAtBegin, Sampler[int]):
    pass


class PythonGenerator:
    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __iter__(self) -> Iterator[int]:
        return iter(shuffled(self.generator))


class NumpyGenerator:
    def __init__(self) -> None:
        self.generator: Any = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(LENGTH).tolist())


class OldNumpyGenerator(NumpyGenerator):
    def __init__(self) -> None:
        self.generator = np.random.RandomState(0)


def with_generator() -> Any:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(range(LENGTH), shuffle=True, generator=generator)  # type: ignore[arg-type]


def with_sampler_of_a_generator() -> Any:
    sampler = RandomSampler(range(LENGTH), generator=torch.Generator().manual_seed(0))
    return DataLoader(range(LENGTH), sampler=sampler)  # type: ignore[arg-type]


COUNTING: list[Callable[[], Any]] = [
    CountsAtBegin,
    CountsAtEnd,
    PythonGenerator,
    NumpyGenerator,
    OldNumpyGenerator,
    with_generator,
    with_sampler_of_a_generator,
    lambda: DataLoader(CountingStream(), batch_size=None),
    lambda: DataLoader(range(LENGTH), sampler=CountingSampler()),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("epoch_length", [None, 10])
@pytest.mark.parametrize("make", COUNTING)
def test_data_that_count_their_own_epochs_go_on_where_they_were(make: Callable[[], Any], epoch_length: Any) -> None:
    whole: list[int] = []
    states: list[Any] = []
    trainer = Engine(lambda engine, batch: whole.append(int(batch)))
    trainer.on(
        Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED,
        lambda engine: states.append((engine.state_dict(), engine.random_state())),
    )
    trainer.run(make(), max_epochs=3, epoch_length=epoch_length)
    assert len({str(whole[first : first + LENGTH]) for first in (0, LENGTH, 2 * LENGTH)}) == 3 or epoch_length
    for position, saved in states[::3]:
        rest: list[int] = []
        again = Engine(lambda engine, batch: rest.append(int(batch)))  # noqa: B023
        again.load_state_dict(position)
        again.load_random_state(saved)
        again.run(make(), max_epochs=3, epoch_length=epoch_length)
        assert rest == whole[position["iteration"] :], position


def test_what_data_keep_travels_with_a_checkpoint_and_settings_do_not(tmp_path: Path) -> None:
    class Counting(CountsAtBegin):
        def __init__(self, setting: int) -> None:
            super().__init__()
            self.setting = setting
            self.generator = np.random.default_rng(3)
            self.python = random.Random(2)

    def run(folder: Path, until: int, setting: int) -> tuple[list[int], int]:
        found: list[int] = []
        data = Counting(setting)
        trainer = Engine(lambda engine, batch: found.append(batch))
        trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint({"trainer": trainer}, folder))
        Checkpoint.resume(folder, {"trainer": trainer})
        trainer.run(data, max_epochs=3, max_iterations=until)
        return found, data.setting

    first, _ = run(tmp_path / "parts", 10, 1)
    rest, setting = run(tmp_path / "parts", 21, 2)
    assert setting == 2
    assert first + rest == run(tmp_path / "whole", 21, 1)[0]


# -- workers that outlive an epoch -------------------------------------------------------------------------------


class Told(Dataset[int]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return self.epoch


class ToldStream(IterableDataset[int]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from [self.epoch, self.epoch]


@pytest.mark.parametrize("kind", [Told, ToldStream])
def test_workers_that_outlive_an_epoch_see_the_right_one_where_the_loader_is_not_prepared(kind: Any) -> None:
    loader = DataLoader(kind(), batch_size=None, num_workers=1, persistent_workers=True)
    found: list[int] = []
    trainer = Engine(lambda engine, batch: found.append(int(batch)))
    trainer.run(loader, max_epochs=3)
    assert found == [0, 0, 1, 1, 2, 2]
    trainer.run(loader)
    assert found[6:] == [0, 0]


def test_workers_of_data_that_hear_of_no_epoch_stay() -> None:
    loader = DataLoader(range(2), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    iterators: list[int] = []
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: iterators.append(id(loader._iterator)))
    trainer.run(loader, max_epochs=2)
    assert len(set(iterators)) == 1
