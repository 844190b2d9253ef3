"""Two jobs that save under one prefix into one folder are told of it, and neither replaces what is the other's."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.checkpoint import save, verify
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint

JOB = """
import sys, torch
from torch import nn
from dengine import Engine, Events
from dengine.handlers import Checkpoint
trainer = Engine(lambda engine, batch: None)
steps = [int(each) for each in sys.argv[2:]]
checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, sys.argv[1], n_saved=9)
trainer.on(Events.ITERATION_COMPLETED(once=steps), checkpoint)
trainer.run(range(9))
"""


def other_job(folder: Path, *steps: int) -> None:
    subprocess.run([sys.executable, "-c", JOB, str(folder), *map(str, steps)], check=True, timeout=120)


def trainer_with(folder: Path, meanwhile: dict[int, Any], **options: Any) -> Engine:
    """Saves after each iteration; before the one of that number, `meanwhile` happens."""
    trainer = Engine(lambda engine, batch: meanwhile.get(engine.state.iteration, lambda: None)())
    trainer.on(Events.ITERATION_COMPLETED, Checkpoint({"model": nn.Linear(1, 1)}, folder, n_saved=9, **options))
    return trainer


def said_of(trainer: Engine, num_iterations: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run(range(num_iterations))
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_another_job_is_told_of_once_and_its_files_stay(tmp_path: Path, is_asynchronous: bool) -> None:
    trainer = trainer_with(tmp_path, {2: lambda: other_job(tmp_path, 8, 9)}, asynchronous=is_asynchronous)
    said = [each for each in said_of(trainer, 4) if "Something else" in each]
    assert len(said) == 1
    assert "checkpoint_8.pt, checkpoint_9.pt" in said[0]
    assert "filename_prefix" in said[0]
    assert {path.name for path in tmp_path.glob("*.pt")} == {f"checkpoint_{step}.pt" for step in (1, 2, 3, 4, 8, 9)}


@pytest.mark.parametrize("first", [1, 2])
def test_what_another_job_has_saved_meanwhile_is_not_replaced(tmp_path: Path, first: int) -> None:
    """`first`: whether this job has looked into the folder before."""
    trainer = trainer_with(tmp_path, {first: lambda: other_job(tmp_path, first)})
    with pytest.raises(CheckpointError, match=rf"checkpoint_{first}\.pt could not be saved.*another job.*process \d+"):
        trainer.run(range(3))
    assert str(os.getpid()) not in verify(tmp_path / f"checkpoint_{first}.pt").writer


def test_a_run_after_another_is_no_rival(tmp_path: Path) -> None:
    other_job(tmp_path, 2, 3)
    assert said_of(trainer_with(tmp_path, {}), 1) != []  # of the later steps
    for _ in range(2):
        assert not [each for each in said_of(trainer_with(tmp_path, {}), 4) if "Something else" in each]


def test_a_save_by_hand_is_no_rival(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, {2: lambda: save(tmp_path / "checkpoint_99.pt", {"model": nn.Linear(1, 1)})})
    assert said_of(trainer, 3) == []


def test_two_in_one_process_are_told_of_but_not_stopped(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, {})
    trainer.on(Events.ITERATION_COMPLETED(every=2), Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, n_saved=9))
    said = [each for each in said_of(trainer, 4) if "Something else" in each]
    assert 1 <= len(said) <= 2
    assert torch.load(tmp_path / "checkpoint_4.pt", weights_only=True)


def test_another_prefix_or_a_score_is_no_rival(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, {})
    best: dict[str, Any] = {"score_function": lambda engine: float(engine.state.iteration)}
    trainer.on(Events.ITERATION_COMPLETED, Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, n_saved=9, **best))
    trainer.on(Events.ITERATION_COMPLETED, Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, "other", n_saved=9))
    assert said_of(trainer, 3) == []
