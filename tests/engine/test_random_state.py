"""A resumed run draws the random numbers of the uninterrupted one, wherever the state was taken."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dengine import Engine, Events
from dengine.random_state import capture, restore


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_captured_generators_draw_the_same_again() -> None:
    draw()
    random.gauss(0, 1)
    np.random.normal()  # both keep a second number for the next call
    state = capture()
    expected = [draw() for _ in range(3)], random.gauss(0, 1), np.random.normal()
    restore(state)
    assert ([draw() for _ in range(3)], random.gauss(0, 1), np.random.normal()) == expected


class Growing:
    """Its length changes with the epoch: 2, 3, 4 batches."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 + self.epoch

    def __iter__(self) -> Any:
        return iter(range(len(self)))


def test_data_that_grows_from_epoch_to_epoch_is_taken_whole() -> None:
    trainer = Engine(lambda engine, batch: None)
    lengths: list[int | None] = []
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: lengths.append(engine.state.epoch_length))
    assert trainer.run(Growing(), max_epochs=3).iteration == 2 + 3 + 4
    assert lengths == [2, 3, 4]


class Vanishing(Growing):
    def __len__(self) -> int:
        return 2 - self.epoch


def test_data_that_shrinks_to_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="gave no batch"):
        Engine(lambda engine, batch: None).run(Vanishing(), max_epochs=5)


def loader(num_workers: int) -> DataLoader[Any]:
    return DataLoader(torch.arange(10), batch_size=2, shuffle=True, num_workers=num_workers)  # type: ignore[arg-type]


def trained(log: list[Any], states: list[Any]) -> Engine:
    trainer = Engine(lambda engine, batch: log.append((batch.tolist(), draw())))

    def keep(engine: Engine) -> None:
        states.append((engine.state.iteration, engine.state_dict(), engine.random_state()))

    trainer.on(Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED, keep)
    trainer.on(Events.EPOCH_STARTED, lambda engine: draw())
    return trainer


def test_a_loader_that_shuffles_by_the_global_generator_goes_on_exactly_from_any_iteration() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    whole: list[Any] = []
    states: list[Any] = []
    trained(whole, states).run(loader(0), max_epochs=3)
    assert len(states) == 15 + 3
    for iteration, position, generators in states:
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        rest: list[Any] = []
        trainer = trained(rest, [])
        trainer.on(Events.STARTED, lambda engine: draw())
        trainer.load_state_dict(position)
        trainer.load_random_state(generators)
        trainer.run(loader(0), max_epochs=3)
        assert rest == whole[iteration:], iteration


def test_generators_are_not_set_while_the_engine_runs() -> None:
    trainer = Engine(lambda engine, batch: engine.load_random_state(engine.random_state()))
    with pytest.raises(RuntimeError, match="running"):
        trainer.run([1])
