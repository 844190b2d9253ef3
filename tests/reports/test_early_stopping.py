"""`EarlyStopping(mode="min", start_after=)`: which way a score counts, and from when on."""

from collections.abc import Iterator
from typing import Any

import pytest

from dengine import Engine, Events
from dengine.handlers import EarlyStopping


def stopped_after(scores: list[float], max_epochs: int | None = None, **options: Any) -> int:
    """Epochs that a training with these scores, one an epoch, has run."""
    given: Iterator[float] = iter(scores)
    trainer, evaluator = Engine(lambda engine, batch: batch), Engine(lambda engine, batch: batch)
    stop = EarlyStopping(score_function=lambda engine: next(given), trainer=trainer, **options)
    evaluator.on(Events.EPOCH_COMPLETED, stop)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([0]))
    return trainer.run([0], max_epochs=max_epochs or len(scores)).epochs_completed


@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("options", [{}, {"min_delta": 0.2}, {"min_delta": 0.2, "cumulative_delta": True}])
def test_min_is_max_of_the_negated_scores(patience: int, options: dict[str, Any]) -> None:
    scores = [5.0, 4.0, 3.9, 3.8, 3.7, 4.5, 3.0, 3.0, 3.1, 3.2]
    lower = stopped_after(scores, patience=patience, mode="min", **options)
    higher = stopped_after([-score for score in scores], patience=patience, **options)
    assert lower == higher


def test_a_falling_loss_goes_on_and_a_rising_one_ends_it() -> None:
    assert stopped_after([4.0, 3.0, 2.0, 1.0], patience=1, mode="min") == 4
    assert stopped_after([1.0, 2.0, 3.0, 4.0], patience=2, mode="min") == 3


def test_a_score_that_is_no_number_is_no_improvement_either_way() -> None:
    for mode in ("min", "max"):
        assert stopped_after([1.0, float("nan"), float("nan"), 1.0], patience=2, mode=mode) == 3


def test_the_best_score_in_the_state_is_the_score_itself() -> None:
    trainer = Engine(lambda engine, batch: batch)
    stop = EarlyStopping(2, lambda engine: 3.0, trainer, mode="min")
    trainer.on(Events.EPOCH_COMPLETED, stop)
    trainer.run([0])
    assert stop.state_dict() == {"best": 3.0, "num_calls_without_improvement": 0}


def test_the_first_calls_are_passed_over_whole() -> None:
    asked: list[int] = []
    trainer = Engine(lambda engine, batch: batch)

    def score(engine: Engine) -> float:
        asked.append(engine.state.epoch)
        return -float(engine.state.epoch)  # worse with every epoch: the best would have been a call passed over

    trainer.on(Events.EPOCH_COMPLETED, EarlyStopping(2, score, trainer, start_after=3))
    assert trainer.run([0], max_epochs=20).epochs_completed == 6
    assert asked == [3, 4, 5]
    asked.clear()
    assert trainer.run([0], max_epochs=20).epochs_completed == 6  # a fresh run passes over as many again
    assert asked == [3, 4, 5]


def test_on_an_evaluator_calls_are_counted_over_all_its_runs() -> None:
    assert stopped_after([1.0] * 9, patience=2, start_after=0) == 3
    assert stopped_after([1.0] * 9, patience=2, start_after=4) == 7


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_a_resumed_training_stops_where_the_uninterrupted_one_does(cut: int) -> None:
    def made() -> tuple[Engine, EarlyStopping]:
        trainer = Engine(lambda engine, batch: batch)
        stop = EarlyStopping(2, lambda engine: 1.0, trainer, start_after=3)
        trainer.on(Events.EPOCH_COMPLETED, stop)
        return trainer, stop

    trainer, stop = made()
    trainer.run([0], max_epochs=cut)
    again, loaded = made()
    again.load_state_dict(trainer.state_dict())
    loaded.load_state_dict(stop.state_dict())
    assert again.run([0], max_epochs=20).epochs_completed == 6


def test_a_state_from_before_there_was_a_start_after_has_passed_it() -> None:
    trainer = Engine(lambda engine, batch: batch)
    stop = EarlyStopping(2, lambda engine: 1.0, trainer, start_after=3)
    trainer.on(Events.EPOCH_COMPLETED, stop)
    stop.load_state_dict({"best": 1.0, "num_calls_without_improvement": 1})
    assert trainer.run([0], max_epochs=9).epochs_completed == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "lower"}, ValueError),
        ({"mode": None}, ValueError),
        ({"mode": ["min"]}, ValueError),
        ({"start_after": -1}, ValueError),
        ({"start_after": 1.5}, TypeError),
        ({"start_after": True}, TypeError),
    ],
)
def test_other_arguments_are_refused_by_name(options: dict[str, Any], error: type[Exception]) -> None:
    trainer = Engine(lambda engine, batch: batch)
    with pytest.raises(error, match=next(iter(options))):
        EarlyStopping(2, lambda engine: 1.0, trainer, **options)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3", None])
def test_a_wrong_count_in_a_state_changes_nothing(wrong: Any) -> None:
    trainer = Engine(lambda engine, batch: batch)
    stop = EarlyStopping(2, lambda engine: 1.0, trainer, start_after=3)
    before = stop.state_dict()
    with pytest.raises(ValueError, match="num_passed_over"):
        stop.load_state_dict({"best": 2.0, "num_calls_without_improvement": 1, "num_passed_over": wrong})
    assert stop.state_dict() == before
