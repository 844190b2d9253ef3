"""Sharded models saved while training goes on: one thread of each rank writes, and none of them joins a collective."""

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Outcome, run_ranks
from tensors import whole_tensor
from torch import nn

from dengine import Engine, Events, distributed
from dengine.checkpoint import load, verify
from dengine.checkpoint.catalogue.manifest import scan
from dengine.control.mailbox import Mailbox
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint

_fsync = os.fsync


def prepared(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = distributed.prepare_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), "fsdp")
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def trainer_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    def train_step(engine: Engine, batch: int) -> None:
        optimizer.zero_grad()
        model(torch.rand(3, 4)).square().sum().backward()
        optimizer.step()

    return Engine(train_step)


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Weights and moments, byte for byte. Collective."""
    found = {}
    for name, parameter in distributed.unwrap_model(model).named_parameters():
        for key, tensor in {"weight": parameter, **optimizer.state.get(parameter, {})}.items():
            whole = whole_tensor(tensor.detach())
            found[f"{name}/{key}"] = whole.numpy().tobytes()
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def held_back(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Step 1 is saved, step 2 too, but its write is held until step 4 is over; step 4 changes what was saved."""
    model, optimizer = prepared(1)
    trainer = trainer_of(model, optimizer)
    checkpoint = Checkpoint({"model": model, "optimizer": optimizer, "trainer": trainer}, folder, asynchronous=True)
    gate, seen = threading.Event(), dict[str, Any]()

    def waiting(descriptor: int) -> None:
        assert gate.wait(250)
        time.sleep(0.3 * rank)  # rank 0 is done first, and the run has to wait for the other
        _fsync(descriptor)

    def hold(engine: Engine) -> None:
        checkpoint.wait()
        os.fsync = waiting

    def look(engine: Engine) -> None:
        seen["while held"] = names(folder)
        distributed.barrier("seen")
        gate.set()

    trainer.on(Events.ITERATION_COMPLETED(once=[1, 2]), checkpoint)
    trainer.on(Events.ITERATION_COMPLETED(once=1), hold, priority=-1)  # behind the save
    trainer.on(Events.ITERATION_COMPLETED(once=2), lambda engine: seen.update(at_two=bits(model, optimizer)))
    trainer.on(Events.ITERATION_COMPLETED(once=4), look)
    trainer.run(range(4))
    seen["at the end"], seen["last"] = names(folder), str(checkpoint.last_path)
    seen["at four"] = bits(model, optimizer)
    os.fsync = _fsync
    other, its_optimizer = prepared(9)
    load(folder / "checkpoint_2", {"model": other, "optimizer": its_optimizer})
    seen["loaded"] = bits(other, its_optimizer)
    return seen


def test_what_is_written_later_is_what_was_saved_and_the_one_before_stays_until_then(tmp_path: Path) -> None:
    for seen in run_ranks(held_back, 2, tmp_path, deadline_s=90):
        assert seen["while held"] == ["checkpoint_1", "manifest.json"]
        assert seen["at the end"] == ["checkpoint_2", "manifest.json"]
        assert seen["last"] == str(tmp_path / "checkpoint_2")
        assert seen["loaded"] == seen["at_two"] != seen["at four"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert scan(tmp_path).listed == {"checkpoint_2": verify(tmp_path / "checkpoint_2")}


def failing_writer(rank: int, size: int, folder: Path, victim: int, is_at_the_end: bool) -> tuple[int, str, list[str]]:
    model, optimizer = prepared(1)
    trainer = trainer_of(model, optimizer)
    checkpoint = Checkpoint({"model": model}, folder, n_saved=9, asynchronous=True)
    trainer.on(Events.ITERATION_COMPLETED(once=[2, 4] if is_at_the_end else [2, 4, 6]), checkpoint)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def fill(engine: Engine) -> None:
        checkpoint.wait()
        if rank == victim:
            os.fsync = full

    trainer.on(Events.ITERATION_COMPLETED(once=3), fill)
    try:
        trainer.run(range(8))
    except CheckpointError as error:
        return trainer.state.iteration, str(error), [one.path.name for one in checkpoint.saved]
    return trainer.state.iteration, "saved", []


@pytest.mark.parametrize(("victim", "is_at_the_end"), [(1, False), (0, False), (1, True)])
def test_an_error_of_one_rank_s_thread_is_raised_on_all_and_nothing_of_the_folder_is_left(
    tmp_path: Path, victim: int, is_at_the_end: bool
) -> None:
    for iteration, message, saved in run_ranks(failing_writer, 2, tmp_path, victim, is_at_the_end, deadline_s=90):
        assert iteration == (8 if is_at_the_end else 6)
        assert "checkpoint_4 could not be saved, and nothing was changed" in message
        assert f"Rank {victim} could not write its part: OSError: [Errno 28] No space left on device" in message
        assert saved == ["checkpoint_2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_2", "manifest.json"]


def killed(rank: int, size: int, folder: Path, victim: int, at: str) -> None:
    """Step 1 is saved; in the save of step 2, one rank is killed before it tells of its part, or before the commit."""
    with distributed.process_group():
        model, optimizer = prepared(1)
        trainer = trainer_of(model, optimizer)
        checkpoint = Checkpoint({"model": model, "trainer": trainer}, folder, asynchronous=True)

        def die(*arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def arm(engine: Engine) -> None:
            checkpoint.wait()
            if rank == victim:
                setattr(Mailbox if at == "post" else os, at, die)

        trainer.on(Events.ITERATION_COMPLETED(once=[1, 2]), checkpoint)
        trainer.on(Events.ITERATION_COMPLETED(once=1), arm, priority=-1)  # behind the save
        trainer.run(range(1000))


def resumed(rank: int, size: int, folder: Path) -> tuple[str, int, list[str]]:
    model, optimizer = prepared(5)
    trainer = trainer_of(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Checkpoint.resume(folder, {"model": model, "trainer": trainer})
    told = [str(each.message) for each in caught if "Resuming" in str(each.message)]
    iteration = trainer.state.iteration
    checkpoint = Checkpoint({"model": model, "trainer": trainer}, folder, asynchronous=True)
    trainer.on(Events.ITERATION_COMPLETED(once=3), checkpoint)
    trainer.run(range(1000), max_iterations=3)
    return Path(str(path)).name, iteration, told


@pytest.mark.parametrize(("victim", "at"), [(1, "post"), (0, "rename")])
def test_a_kill_between_write_and_commit_leaves_the_one_before_and_frees_the_other_rank(
    tmp_path: Path, victim: int, at: str
) -> None:
    outcomes: list[Outcome[None]] = run_ranks(
        killed, 2, tmp_path, victim, at, init=False, expect_failures=True, deadline_s=90
    )
    assert outcomes[victim].exitcode == -signal.SIGKILL
    assert outcomes[1 - victim].error_type == "RemoteRankError"  # and not the deadline
    assert names(tmp_path) == ["checkpoint_1", "manifest.json"]
    verify(tmp_path / "checkpoint_1")
    assert run_ranks(resumed, 2, tmp_path, deadline_s=90) == [("checkpoint_1", 1, [])] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_3", "manifest.json"]


def written_slowly(rank: int, size: int, folder: Path) -> int:
    real = os.write

    def slow(descriptor: int, data: Any) -> int:
        time.sleep(0.7 if len(data) > 1000 else 0)
        return real(descriptor, data[:1_000_000])

    os.write = slow
    with distributed.process_group(timeout=300, stall_timeout=4.0):
        model = distributed.prepare_model(nn.Linear(2000, 1500), "fsdp")
        trainer = Engine(lambda engine, batch: None)
        trainer.on(Events.EPOCH_COMPLETED, Checkpoint({"model": model}, folder))
        trainer.run(range(2))
        return distributed.all_reduce(1)


def test_a_sharded_save_that_goes_on_is_no_stall(tmp_path: Path) -> None:
    assert run_ranks(written_slowly, 2, tmp_path, init=False) == [2, 2]
    assert verify(tmp_path / "checkpoint_2").num_bytes > 12_000_000
