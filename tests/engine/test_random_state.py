"""A resumed run draws the random numbers of the uninterrupted one, wherever the state was taken."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchmetrics import CatMetric
from torchmetrics.classification import BinaryAccuracy

from dengine import Engine, Events, distributed
from dengine.metrics import Accuracy, Average, DistributedMetric, F1Score
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


class Total:
    """A metric as anybody writes it: no base class, nothing declared."""

    def __init__(self) -> None:
        self.parts: list[float] = []

    def reset(self) -> None:
        self.parts = []

    def update(self, output: Any) -> None:
        self.parts.append(float(output[0].sum()))

    def compute(self) -> float:
        return sum(self.parts)


def with_metrics() -> tuple[Engine, list[Any], list[Any]]:
    trainer = Engine(lambda engine, batch: (batch, batch))
    f1 = F1Score(num_classes=10, average="macro", output_transform=lambda pair: (pair[0] % 3, pair[1]))
    trainer.add_metrics({"acc": Accuracy(), "f1": f1, "both": Accuracy() + f1, "total": Total()})
    trainer.add_metric(DistributedMetric(Total()), "distributed")
    trainer.add_metric(BinaryAccuracy(), "torch", output_transform=lambda pair: (pair[0] % 2, pair[0] % 3 % 2))
    trainer.add_metric(CatMetric(), "cat", output_transform=lambda pair: (pair[0].float(),))
    values: list[Any] = []
    states: list[Any] = []
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: values.append({**engine.state.metrics}))
    trainer.on(
        Events.ITERATION_COMPLETED,
        lambda engine: states.append((engine.state.iteration, engine.state_dict(), engine.random_state())),
    )
    return trainer, values, states


def test_the_metrics_of_an_epoch_that_is_resumed_are_those_of_the_whole_epoch(tmp_path: Path) -> None:
    trainer, expected, states = with_metrics()
    trainer.run(loader(0), max_epochs=2)
    assert len(expected) == 2
    for iteration, position, gathered in states:
        torch.save(gathered, tmp_path / "state.pt")
        again, values, _ = with_metrics()
        again.load_state_dict(position)
        again.load_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
        again.run(loader(0), max_epochs=2)
        assert len(values) == (2 if iteration <= 5 else 1), iteration
        for found, wanted in zip(values[::-1], expected[::-1], strict=False):
            for name, value in wanted.items():
                assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), (iteration, name)


def test_other_metrics_than_the_run_was_begun_with_count_what_is_left_and_say_so() -> None:
    trainer, _, states = with_metrics()
    trainer.run(loader(0))
    again = Engine(lambda engine, batch: (batch, batch))
    again.add_metric(Average(lambda pair: float(len(pair[0]))), "other")
    again.load_state_dict(states[2][1])
    again.load_random_state(states[2][2])
    with pytest.warns(RuntimeWarning, match="what is left"):
        assert again.run(loader(0)).metrics["other"] == 2.0


def prepared(batch_size: int, seed: int = 0) -> DataLoader[Any]:
    data: Any = torch.arange(12)
    return distributed.prepare_data_loader(DataLoader(data, batch_size=batch_size, shuffle=True), seed=seed)


def test_an_epoch_goes_on_with_the_data_that_it_was_begun_with_or_is_refused() -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.run(prepared(2), max_iterations=2)
    position = trainer.state_dict()
    for changed, words in ((prepared(3), "2 and is 3"), (prepared(2, seed=5), "0 and is 5")):
        again = Engine(lambda engine, batch: None)
        again.load_state_dict(position)
        with pytest.raises(ValueError, match=words):
            again.run(changed)
        assert again.run(prepared(2)).iteration == 6  # the refusal has changed nothing
        again.load_state_dict(position)
        again.run(changed, allow_changed_data=True)


@pytest.mark.parametrize(("changed", "words"), [(prepared(3), "2 and is 3"), (prepared(2, seed=5), "0 and is 5")])
def test_between_two_epochs_data_changes_only_where_that_is_wanted(changed: DataLoader[Any], words: str) -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.run(prepared(2))
    again = Engine(lambda engine, batch: None)
    again.load_state_dict(trainer.state_dict())
    with pytest.raises(ValueError, match=words):
        again.run(changed, max_epochs=2)
    assert again.run(changed, max_epochs=2, allow_changed_data=True).iteration == 6 + len(changed)


class GrowingSet(Dataset[int]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4 + 4 * self.epoch

    def __getitem__(self, index: int) -> int:
        return index


def test_data_that_grows_by_the_epoch_goes_on_within_one() -> None:
    def run(**options: Any) -> Any:
        loader = distributed.prepare_data_loader(DataLoader(GrowingSet(), batch_size=2))
        return trainer.run(loader, max_epochs=3, **options)

    trainer = Engine(lambda engine, batch: None)
    run(max_iterations=4)
    trainer.load_state_dict(trainer.state_dict())
    assert run().iteration == 2 + 4 + 6


def test_a_run_that_was_over_when_it_was_saved_draws_on_as_if_it_had_just_ended() -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.run([1, 2])
    position, generators = trainer.state_dict(), trainer.random_state()
    expected = torch.rand(3)
    again = Engine(lambda engine, batch: None)
    again.load_state_dict(position)
    again.load_random_state(generators)
    assert again.run([1, 2]).iteration == 2
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again.run([1, 2])  # afresh: nothing is left of what was loaded
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["loader", "generator", "list", "prepared"])
def test_data_that_must_be_drawn_up_to_the_position_says_so_once(kind: str) -> None:
    def data() -> Any:
        numbers: Any = torch.arange(12)
        loader: DataLoader[Any] = DataLoader(numbers, batch_size=2)
        kinds = {"loader": loader, "generator": iter(range(24)), "list": list(range(6))}
        return kinds.get(kind) or distributed.prepare_data_loader(loader)

    trainer = Engine(lambda engine, batch: None)
    trainer.run(data(), max_epochs=2, max_iterations=3, epoch_length=6)
    trainer.load_state_dict(trainer.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run(data(), max_epochs=2, epoch_length=6)
    said = ["3 batches are drawn" in str(each.message) for each in caught]
    assert said == ([True] if kind in ("loader", "generator") else [])
