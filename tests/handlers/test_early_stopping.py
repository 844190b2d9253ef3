"""At which call the training ends, from a table of scores."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import EarlyStopping

NAN = float("nan")


def last_epoch(scores: list[float], **options: Any) -> int:
    trainer = Engine(lambda engine, batch: batch)
    stop = EarlyStopping(score_function=lambda engine: scores[engine.state.epoch], trainer=trainer, **options)
    trainer.on(Events.EPOCH_COMPLETED, stop)
    return trainer.run([0], max_epochs=len(scores)).epoch


@pytest.mark.parametrize(
    ("scores", "options", "epoch"),
    [
        ([1, 2, 3, 4], {"patience": 1}, 3),
        ([1, 1, 5], {"patience": 1}, 1),
        ([1, 0, 2, 1, 1, 9], {"patience": 2}, 4),
        ([5, 4, 3, 2], {"patience": 3}, 3),
        # Small steps up: each is below min_delta of the best so far, or together above that of the last improvement.
        ([1.0, 1.06, 1.12, 1.18], {"patience": 2, "min_delta": 0.1}, 2),
        ([1.0, 1.06, 1.12, 1.18], {"patience": 2, "min_delta": 0.1, "cumulative_delta": True}, 3),
        ([1.0, 1.1, 9.0], {"patience": 1, "min_delta": 0.1}, 2),  # 1.1 > 1.0 + 0.1 only by rounding: see below
        ([NAN, NAN, 1], {"patience": 2}, 1),
        ([1, NAN, 2, 3], {"patience": 2}, 3),
        ([NAN, 1, 2], {"patience": 2}, 2),
        ([float("-inf"), 1, 2], {"patience": 1}, 2),
    ],
)
def test_the_training_ends_after_patience_calls_without_an_improvement(
    scores: list[float], options: dict[str, Any], epoch: int
) -> None:
    if scores[:2] == [1.0, 1.1]:
        epoch = 2 if scores[1] > scores[0] + 0.1 else 1
    assert last_epoch(scores, **options) == epoch


def test_it_stops_another_engine_than_the_one_it_watches() -> None:
    trainer = Engine(lambda engine, batch: batch)
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.on(Events.EPOCH_COMPLETED, EarlyStopping(2, lambda engine: 0.0, trainer))
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1, 2]) and None)
    assert trainer.run([0], max_epochs=10).epoch == 2
    assert evaluator.run([1, 2]).epochs_completed == 1


def test_its_state_goes_on_counting() -> None:
    scores = [3, 2, 1, 0]
    trainer = Engine(lambda engine, batch: batch)
    first = EarlyStopping(3, lambda engine: scores[engine.state.epoch], trainer)
    trainer.on(Events.EPOCH_COMPLETED, first)
    trainer.run([0], max_epochs=3)
    second_trainer = Engine(lambda engine, batch: batch)
    second = EarlyStopping(3, lambda engine: 2.5, second_trainer)
    second.load_state_dict(first.state_dict())
    second_trainer.on(Events.EPOCH_COMPLETED, second)
    assert second_trainer.run([0], max_epochs=5).epoch == 0


@pytest.mark.parametrize(("patience", "epochs"), [(2, 3), (3, 4)])  # as before, and raised for the resumed run
def test_a_run_that_was_stopped_and_is_resumed_from_that_very_moment_gets_no_further_epoch(
    patience: int, epochs: int
) -> None:
    scores = [3, 2, 1, 0, 0]

    def stopping(patience: int) -> tuple[Engine, EarlyStopping]:
        trainer = Engine(lambda engine, batch: batch)
        stop = EarlyStopping(patience, lambda engine: scores[engine.state.epoch], trainer)
        trainer.on(Events.EPOCH_COMPLETED, stop)
        return trainer, stop

    (first, stopped), (second, resumed) = stopping(2), stopping(patience)
    first.run([0], max_epochs=5)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    assert second.run([0], max_epochs=5).epochs_completed == epochs
    assert second.run([0], max_epochs=1).epochs_completed == 1  # a new run is one


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"num_calls_without_improvement": 0}, "lacks best"),
        ({"best": 1.0, "num_calls_without_improvement": 0, "x": 1}, "unknown entries: 'x'"),
        ({"best": "1", "num_calls_without_improvement": 0}, "best='1' .* must be a number or None"),
        ({"best": 1.0, "num_calls_without_improvement": -1}, "num_calls_without_improvement=-1 .* at least 0"),
        ([1], "is a dict, but got a list"),
    ],
)
def test_a_wrong_state_is_named_and_nothing_changes(state: Any, message: str) -> None:
    stop = EarlyStopping(3, lambda engine: 0.0, Engine(lambda engine, batch: batch))
    with pytest.raises(ValueError, match=message):
        stop.load_state_dict(state)
    assert stop.state_dict() == {"best": None, "num_calls_without_improvement": 0}


@pytest.mark.parametrize("score", [None, "high", torch.zeros(2)])
def test_a_score_that_is_no_number_is_named(score: Any) -> None:
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.EPOCH_COMPLETED, EarlyStopping(3, lambda engine: score, trainer))
    with pytest.raises(TypeError, match="score_function gave .* compares one number a call"):
        trainer.run([0])


def test_its_state_can_be_read_without_a_pickle_and_a_score_may_be_a_tensor(tmp_path: Path) -> None:
    trainer = Engine(lambda engine, batch: batch)
    stop = EarlyStopping(3, lambda engine: torch.tensor(0.5), trainer)
    trainer.on(Events.EPOCH_COMPLETED, stop)
    trainer.run([0], max_epochs=2)
    torch.save(stop.state_dict(), tmp_path / "stop.pt")
    expected = {"best": 0.5, "num_calls_without_improvement": 1}
    assert torch.load(tmp_path / "stop.pt", weights_only=True) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience=0 must be at least 1"),
        ({"score_function": 0.5}, TypeError, "score_function=0.5 must be callable"),
        ({"trainer": None}, TypeError, "trainer=None must be the Engine"),
        ({"min_delta": -1}, ValueError, "min_delta=-1 must be at least 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {"patience": 1, "score_function": lambda engine: 0.0, "trainer": Engine(lambda engine, batch: batch)}
    with pytest.raises(error, match=message):
        EarlyStopping(**{**right, **options})


def test_a_min_delta_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="min_delta='a' must be a number"):
        EarlyStopping(1, lambda engine: 0.0, Engine(lambda engine, batch: None), min_delta="a")  # type: ignore[arg-type]


def test_another_run_begins_without_a_best_score() -> None:
    trainer = Engine(lambda engine, batch: None)
    scores = iter([0.9, 0.8, 0.7, 0.5, 0.6, 0.4, 0.3])
    stop = EarlyStopping(2, lambda engine: next(scores), trainer)
    trainer.on(Events.EPOCH_COMPLETED, stop)
    assert trainer.run([0], max_epochs=9).epochs_completed == 3
    assert trainer.run([0], max_epochs=9).epochs_completed == 4
