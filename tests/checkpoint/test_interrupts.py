"""Ctrl-C while a thread writes: once, and again while the run waits for that thread."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.atomic_files import write_beside
from dengine.checkpoint import load, verify
from dengine.checkpoint.disk.background import Writing
from dengine.checkpoint.disk.hashing import HashingWriter
from dengine.handlers import Checkpoint

# The disk waits for two interrupts, in a step and while the run waits for the disk, and then for a moment more.
TWICE_INTERRUPTED = """
import os, signal, sys, threading, time
import torch
from dengine import Engine, Events
from dengine.checkpoint.disk.background import Writing
from dengine.handlers import Checkpoint

fsync, within = os.fsync, Writing.is_done_within
in_step, run_waits = threading.Event(), threading.Event()

def slow(descriptor):
    os.fsync = fsync
    for event in (in_step, run_waits):
        event.wait()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.0)
    fsync(descriptor)

def waiting(writing, timeout_s):
    run_waits.set()
    return within(writing, timeout_s)

def step(engine, batch):
    if batch == 1:
        in_step.set()
        time.sleep(600)

os.fsync, Writing.is_done_within = slow, waiting
trainer = Engine(step)
checkpoint = Checkpoint({"model": torch.nn.Linear(2, 2)}, sys.argv[1], asynchronous=True)
trainer.on(Events.ITERATION_COMPLETED, checkpoint)
trainer.run(range(9))
"""


def test_two_interrupts_end_the_run_and_the_process_once_the_file_is_safe(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWICE_INTERRUPTED, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == -signal.SIGINT, ended.stderr
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")
    assert verify(tmp_path / "checkpoint_1.pt").step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1.pt", "manifest.json"]


def test_a_save_after_an_interrupted_wait_waits_for_the_write_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run_waits, gate = nn.Linear(4, 4, bias=False), threading.Event(), threading.Event()
    write, within, result = os.write, Writing.is_done_within, Writing.result

    def held(descriptor: int, data: bytes) -> int:
        if threading.current_thread() is not threading.main_thread() and not gate.is_set():
            assert run_waits.wait(30)
            os.kill(os.getpid(), signal.SIGINT)
            assert gate.wait(30)
        return write(descriptor, data)

    def waiting(writing: Writing[Any], timeout_s: float) -> bool:
        run_waits.set()
        # In short waits: Python sees a signal that comes just before one when that is over.
        return any(within(writing, 0.1) for _ in range(300))

    def awaited(writing: Writing[Any]) -> Any:
        gate.set()
        return result(writing)

    def step(engine: Engine, batch: float) -> None:
        if batch == 0.0:
            raise KeyboardInterrupt
        nn.init.constant_(model.weight, batch)

    trainer = Engine(step)
    value: Any = lambda engine, event: int(model.weight[0, 0])  # noqa: E731
    checkpoint = Checkpoint({"model": model}, tmp_path, n_saved=3, global_step_transform=value, asynchronous=True)
    trainer.on(Events.ITERATION_COMPLETED, checkpoint)
    monkeypatch.setattr(os, "write", held)
    monkeypatch.setattr(Writing, "is_done_within", waiting)
    monkeypatch.setattr(Writing, "result", awaited)
    with pytest.raises(KeyboardInterrupt):
        trainer.run([1.0, 0.0])
    assert not gate.is_set()
    # As in a notebook, where an interrupt ends a cell: another run, whose first save comes at once.
    with pytest.warns(UserWarning, match=r"checkpoint_1\.pt is still being written"):
        trainer.run([2.0, 3.0])
    assert [saved.step for saved in checkpoint.saved] == [1, 2, 3]
    for saved in checkpoint.saved:
        load(saved.path, {"model": model})
        assert torch.equal(model.weight, torch.full((4, 4), float(saved.step)))


@pytest.mark.parametrize("where", ["as the digest's thread starts", "within torch's writer"])
def test_an_interrupt_within_a_save_is_no_failure_of_it(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    trainer, model = Engine(lambda engine, batch: None), nn.Linear(400, 400)  # large enough for a thread
    trainer.on(Events.ITERATION_COMPLETED, Checkpoint({"model": model}, tmp_path))
    trainer.run([1])
    with monkeypatch.context() as patched:
        if "digest" in where:
            patched.setattr(threading.Thread, "start", interrupted)
        else:
            patched.setattr(HashingWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.run([1, 1], max_epochs=2)
    assert verify(tmp_path / "checkpoint_1.pt").step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1.pt", "manifest.json"]


def test_a_full_disk_met_while_an_interrupt_is_handled_is_told(tmp_path: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError("No space left")

    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(OSError, match="No space left"):
            write_beside(tmp_path / "model.pt", full)


def test_a_write_that_an_interrupt_kept_from_being_told_to_go_goes_all_the_same() -> None:
    ran = threading.Event()
    Writing(lambda: ran.set)  # forgotten before go()
    assert ran.wait(30)
    assert Writing(lambda: lambda: 7).result() == 7
    assert Writing(lambda: lambda: None).is_done_within(30)
