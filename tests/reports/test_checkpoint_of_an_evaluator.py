"""A best `Checkpoint` of an evaluator is called by the step of its trainer, and `n_saved=None` keeps all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dengine import Engine, Events, create_supervised_trainer
from dengine.handlers import Checkpoint


def nothing(engine: Engine, batch: Any) -> Any:
    return batch


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def evaluated(trainer: Engine, evaluator: Engine) -> None:
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1, 2, 3]))


def with_score(scores: Iterator[float], folder: Path, **options: Any) -> Checkpoint:
    model = torch.nn.Linear(1, 1)
    return Checkpoint({"model": model}, folder, "best", score_function=lambda engine: next(scores), **options)


@pytest.mark.parametrize("event", [Events.EPOCH_COMPLETED, Events.COMPLETED])
def test_equal_scores_of_several_evaluations_do_not_share_a_name(tmp_path: Path, event: Events) -> None:
    trainer, evaluator = Engine(nothing), Engine(nothing)
    checkpoint = with_score(iter([0.5, 0.6, 0.5]), tmp_path, score_name="acc", n_saved=3)
    evaluator.on(event, checkpoint)
    evaluated(trainer, evaluator)
    trainer.run(range(4), max_epochs=3)
    assert names(tmp_path) == ["best_12_acc=0.5000.pt", "best_4_acc=0.5000.pt", "best_8_acc=0.6000.pt"]
    assert [saved.step for saved in checkpoint.saved] == [4, 8, 12]


def test_the_trainer_that_runs_the_evaluation_counts_not_one_around_it(tmp_path: Path) -> None:
    evaluator = Engine(nothing)
    evaluator.on(Events.EPOCH_COMPLETED, Checkpoint({"model": torch.nn.Linear(1, 1)}, tmp_path, n_saved=None))

    def trial(engine: Engine, batch: Any) -> None:
        trainer = Engine(nothing)
        evaluated(trainer, evaluator)
        trainer.run(range(5), max_epochs=2)

    Engine(trial).run([1])
    assert names(tmp_path) == ["checkpoint_10.pt", "checkpoint_5.pt"]


def test_an_evaluation_inside_an_evaluation_takes_the_step_of_the_trainer_that_is_saved(tmp_path: Path) -> None:
    trainer, evaluator, inner = Engine(nothing), Engine(nothing), Engine(nothing)
    inner.on(Events.COMPLETED, Checkpoint({"trainer": trainer}, tmp_path, n_saved=None))
    evaluator.on(Events.EPOCH_COMPLETED, lambda engine: inner.run([1]))
    evaluated(trainer, evaluator)
    trainer.run(range(4), max_epochs=2)
    assert names(tmp_path) == ["checkpoint_4.pt", "checkpoint_8.pt"]


def test_a_trainer_inside_another_run_is_no_evaluator(tmp_path: Path) -> None:
    inner = Engine(nothing)
    inner.on(Events.EPOCH_COMPLETED, Checkpoint({"model": torch.nn.Linear(1, 1)}, tmp_path / "epochs", n_saved=None))
    inner.on(Events.ITERATION_COMPLETED(every=2), Checkpoint({"trainer": inner}, tmp_path / "own", n_saved=None))
    Engine(lambda engine, batch: inner.run(range(2), max_epochs=2)).run([1])
    assert names(tmp_path / "epochs") == names(tmp_path / "own") == ["checkpoint_2.pt", "checkpoint_4.pt"]


@pytest.mark.parametrize("is_supervised", [False, True])
def test_a_trainer_of_one_epoch_inside_another_run_is_no_evaluator(tmp_path: Path, is_supervised: bool) -> None:
    model = torch.nn.Linear(1, 1)
    if is_supervised:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inner = create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss)
    else:
        inner = Engine(nothing)
        inner.is_trainer = True
    inner.on(Events.EPOCH_COMPLETED, Checkpoint({"model": model}, tmp_path))
    data = [(torch.ones(2, 1), torch.ones(2, 1))] * 3
    Engine(lambda engine, batch: inner.run(data)).run([1])
    assert names(tmp_path) == ["checkpoint_3.pt"]


def test_an_evaluator_that_nobody_runs_inside_takes_its_own_step(tmp_path: Path) -> None:
    evaluator = Engine(nothing)
    evaluator.on(Events.EPOCH_COMPLETED, Checkpoint({"model": torch.nn.Linear(1, 1)}, tmp_path))
    evaluator.run(range(7))
    assert names(tmp_path) == ["checkpoint_7.pt"]


def test_a_transform_of_the_users_own_still_decides(tmp_path: Path) -> None:
    trainer, evaluator = Engine(nothing), Engine(nothing)
    checkpoint = with_score(iter([1.0, 2.0]), tmp_path, n_saved=2, global_step_transform=lambda engine, event: 77)
    evaluator.on(Events.EPOCH_COMPLETED, checkpoint)
    evaluated(trainer, evaluator)
    trainer.run(range(4), max_epochs=2)
    assert names(tmp_path) == ["best_77_score=1.0000.pt", "best_77_score=2.0000.pt"]


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_none_keeps_all_and_so_does_a_restarted_run(tmp_path: Path, is_asynchronous: bool) -> None:
    for first in (0, 4):
        trainer = Engine(nothing)
        checkpoint = Checkpoint({"trainer": trainer}, tmp_path, n_saved=None, asynchronous=is_asynchronous)
        trainer.on(Events.ITERATION_COMPLETED, checkpoint)
        if first:
            Checkpoint.resume(tmp_path, {"trainer": trainer})
        trainer.run(range(8), max_iterations=first + 4)
    assert names(tmp_path) == [f"checkpoint_{step}.pt" for step in range(1, 9)]
    assert [saved.step for saved in checkpoint.saved] == list(range(1, 9))


def test_none_keeps_the_worse_scores_too(tmp_path: Path) -> None:
    trainer = Engine(nothing)
    trainer.on(Events.EPOCH_COMPLETED, with_score(iter([3.0, 1.0, 2.0]), tmp_path, n_saved=None))
    trainer.run([0], max_epochs=3)
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "all"])
def test_other_numbers_of_files_are_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="n_saved"):
        Checkpoint({"model": torch.nn.Linear(1, 1)}, tmp_path, n_saved=wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", 3),
        ("best_acc", 0.5),
        ("name", "resnet"),
        ("config", {"lr": 0.1}),
        ("losses", [1.0, 2.0]),
        ("flag", True),
        ("scale", np.float32(2.0)),
        ("history", np.zeros(3)),
        ("a name with spaces", 3),
    ],
)
def test_a_plain_value_among_what_is_saved_names_the_state_that_keeps_it(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"'{name}' cannot be saved.*state\.persist\("):
        Checkpoint({name: value}, tmp_path)


def test_what_the_message_says_works(tmp_path: Path) -> None:
    trainer: Any = Engine(nothing)
    trainer.state.best_acc = 0.5
    trainer.state.persist("best_acc")
    trainer.on(Events.COMPLETED, Checkpoint({"trainer": trainer}, tmp_path))
    trainer.run([1])
    again: Any = Engine(nothing)
    Checkpoint.resume(tmp_path, {"trainer": again})
    assert again.state.best_acc == 0.5


@pytest.mark.parametrize(
    ("value", "way_out"),
    [(torch.zeros(2), "buffer"), (None, "leave it out"), (torch.nn.Linear, "pass an instance"), (object(), "object")],
)
def test_other_things_without_a_state_say_what_they_are(tmp_path: Path, value: Any, way_out: str) -> None:
    with pytest.raises(TypeError, match=f"'x' cannot be saved.*{way_out}"):
        Checkpoint({"x": value}, tmp_path)
