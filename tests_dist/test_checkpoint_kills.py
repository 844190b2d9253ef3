"""Kills in the middle of saving: before each call that reaches the disk, and with a write half done.

`DENGINE_CHECKPOINT_KILLS=200` raises the number of kills (default 25, spread over all calls of a run, for each way of
saving).
"""

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from dengine import Engine, Events
from dengine.checkpoint import latest, verify
from dengine.checkpoint.catalogue.manifest import scan
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint

NUM_KILLS = int(os.environ.get("DENGINE_CHECKPOINT_KILLS", "25"))
CALLS = ("open", "write", "fsync", "replace", "unlink")
NUM_STEPS = 4
N_SAVED = 2

_write = os.write


def training(folder: Path, steps: range, asynchronous: bool, told: Callable[[int], Any]) -> None:
    """Saves after each step: the last two, and the best one by a score that grows."""
    model = nn.Linear(2, 2)
    trainer = Engine(lambda engine, batch: [parameter.data.fill_(batch) for parameter in model.parameters()])
    objects = {"model": model, "trainer": trainer}
    last = Checkpoint(objects, folder, n_saved=N_SAVED, asynchronous=asynchronous, global_step_transform=step_of)
    best = Checkpoint(objects, folder, "best", 1, step_of, "s", step_of, asynchronous)
    for number, checkpoint in enumerate((last, best)):
        trainer.on(Events.ITERATION_COMPLETED, checkpoint, priority=-2 * number)
        trainer.on(
            Events.ITERATION_COMPLETED,
            lambda engine, checkpoint=checkpoint: checkpoint.wait(),
            priority=-2 * number - 1,
        )
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: told(step_of(engine)), priority=-9)
    trainer.run(steps)


def step_of(engine: Engine, event: Any = None) -> int:
    return int(engine.state.batch)


def child(folder: Path, asynchronous: bool, at: int | None, pipe: int) -> None:
    """Be killed at call number `at` of those that reach the disk; tell each step that is over, and all calls."""
    count = 0

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                if name == "write":
                    _write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return called

    for name in CALLS:
        setattr(os, name, wrap(name))
    training(folder, range(1, NUM_STEPS + 1), asynchronous, lambda step: _write(pipe, f"{step}\n".encode()))
    _write(pipe, f"calls {count}\n".encode())


def forked(folder: Path, asynchronous: bool, at: int | None) -> tuple[list[str], int]:
    """What a child told before its end, and how it ended: 0 or minus the signal."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            child(folder, asynchronous, at, writing)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        lines = told.read().splitlines()
    _, status = os.waitpid(pid, 0)
    return lines, os.waitstatus_to_exitcode(status)


def wrong_with(folder: Path, done: int) -> str | None:
    """What a run killed after step `done` has left that it should not have; None: nothing."""
    files = sorted(path for path in folder.glob("*.pt"))
    try:
        for path in files:
            verify(path)
    except CheckpointError as error:
        return f"a file under its final name is not whole: {error}"
    steps = sorted(int(path.stem.split("_")[1]) for path in files if path.name.startswith("checkpoint"))
    wanted = set(range(max(1, done - N_SAVED + 1), done + 1))
    if steps and steps[-1] > done and len(wanted) == N_SAVED:
        wanted.discard(min(wanted))  # the one that the next step replaced
    if not wanted <= set(steps):
        return f"lost: {wanted - set(steps)} of what was saved; there is {steps}"
    for prefix in ("checkpoint", "best"):
        if problem := resume_problem(folder, prefix, done):
            return problem
    return None


def resume_problem(folder: Path, prefix: str, done: int) -> str | None:
    model, trainer = nn.Linear(2, 2), Engine(lambda engine, batch: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is damaged, so nothing may be passed over
        if not done:  # nor need there be one of each prefix before the first step is done
            warnings.filterwarnings("ignore", f".* holds no checkpoint {prefix!r}, so the run begins anew")
        path = Checkpoint.resume(folder, {"model": model, "trainer": trainer}, prefix)
    if path is None:
        return f"{prefix}: nothing to resume from" if done else None
    step = int(path.stem.split("_")[1])
    there = [int(each.stem.split("_")[1]) for each in folder.glob(f"{prefix}_*.pt")]
    if step != max(there) or step not in (done, done + 1):
        return f"{prefix}: resumed from step {step} of {there}, after step {done}"
    if not all(bool((parameter == step).all()) for parameter in model.parameters()) or trainer.state.iteration != step:
        return f"{prefix}: step {step} holds the values of another one"
    return None


def wrong_after(folder: Path, done: int, asynchronous: bool) -> str | None:
    """What is wrong once the run has been started again and has ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training(folder, range(done + 1, NUM_STEPS + 3), asynchronous, lambda step: None)
    there = sorted(path.name for path in folder.iterdir())
    end = NUM_STEPS + 2
    wanted = [f"best_{end}_s={end:.4f}.pt", f"checkpoint_{end - 1}.pt", f"checkpoint_{end}.pt", "manifest.json"]
    if there != wanted:
        return f"after the restart there is {there}, not {wanted}"
    found = scan(folder)
    if found.problem or {*found.listed} != {*wanted[:-1]} or str(latest(folder)) != str(folder / wanted[2]):
        return f"the manifest is off: {found.problem} {sorted(found.listed)}"
    return None


def killed_everywhere(
    rank: int, size: int, root: str, asynchronous: bool, num_kills: int
) -> tuple[int, int, list[str]]:
    torch.set_num_threads(1)
    lines, code = forked(Path(root) / "whole", asynchronous, None)
    assert code == 0, lines
    num_calls = int(lines[-1].split()[1])
    points = sorted({1 + index * num_calls // num_kills for index in range(num_kills)})
    problems = []
    for at in points:
        folder = Path(root) / f"killed{at}"
        folder.mkdir()
        lines, code = forked(folder, asynchronous, at)
        done = int(lines[-1]) if lines else 0
        problem = f"ended with {code}" if code != -signal.SIGKILL else wrong_with(folder, done)
        problem = problem or wrong_after(folder, done, asynchronous)
        if problem:
            problems.append(f"call {at} of {num_calls}: {problem}")
    return len(points), num_calls, problems


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_at_any_call_leaves_the_newest_complete_one_and_a_folder_that_goes_on(
    tmp_path: Path, asynchronous: bool
) -> None:
    ((num_points, num_calls, problems),) = run_ranks(
        killed_everywhere, 1, str(tmp_path), asynchronous, NUM_KILLS, init=False, deadline_s=60 + NUM_KILLS
    )
    assert problems == []
    assert num_points == min(NUM_KILLS, num_calls)
