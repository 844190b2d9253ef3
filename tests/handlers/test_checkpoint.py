"""What stands in the folder after each call, and after a call that failed."""

import os
import re
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.checkpoint.disk.background import Writing
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint


class Unsavable:
    def state_dict(self) -> dict[str, Any]:
        return {"function": lambda: None}  # does not pickle

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def names(folder: Path) -> list[str]:
    """All that is in the folder but for the manifest."""
    return sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")


def saved_by(checkpoint: Checkpoint, num_epochs: int, scores: list[float] | None = None) -> Engine:
    trainer = Engine(lambda engine, batch: batch)
    if scores is not None:
        trainer.on(Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(s=scores[engine.state.epoch]))
    trainer.on(Events.EPOCH_COMPLETED, checkpoint)
    trainer.run([0, 1], max_epochs=num_epochs)
    return trainer


def best_of(folder: Path, n_saved: int, **options: Any) -> Checkpoint:
    return Checkpoint(
        {"model": nn.Linear(1, 1)}, folder, "best", n_saved, lambda engine: engine.state.metrics["s"], **options
    )


def test_the_newest_n_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path / "new" / "folder", n_saved=2)
    saved_by(checkpoint, 4)
    assert names(tmp_path / "new" / "folder") == ["checkpoint_6.pt", "checkpoint_8.pt"]
    assert checkpoint.last_path == tmp_path / "new" / "folder" / "checkpoint_8.pt"
    assert [one.step for one in checkpoint.saved] == [6, 8]


class Looking:
    """A handler that looks before each save, and refuses the third."""

    precedes_saves = True

    def __init__(self) -> None:
        self.iterations: list[int] = []

    def __call__(self, engine: Engine) -> None:
        self.iterations.append(engine.state.iteration)
        if len(self.iterations) == 3:
            raise ValueError("not this one")


def test_a_handler_that_precedes_saves_is_called_before_each_and_may_refuse_it(tmp_path: Path) -> None:
    trainer, looking = Engine(lambda engine, batch: batch), Looking()
    trainer.on(Events.ITERATION_COMPLETED(every=1000) | Events.EPOCH_COMPLETED(every=1000), looking)
    scores = [1.0, 0.5, 2.0, 3.0]
    best = Checkpoint(
        {"model": nn.Linear(1, 1)}, tmp_path, score_function=lambda engine: scores[engine.state.iteration - 1]
    )
    trainer.on(Events.ITERATION_COMPLETED, best)
    with pytest.raises(ValueError, match="not this one"):
        trainer.run(range(4))
    assert looking.iterations == [1, 3, 4]  # what is not saved is not looked at
    assert names(tmp_path) == ["checkpoint_3_score=2.0000.pt"]
    trainer.run(range(4))
    assert names(tmp_path) == ["checkpoint_4_score=3.0000.pt"]


def test_the_best_n_are_kept_by_score_with_the_score_in_the_name(tmp_path: Path) -> None:
    checkpoint = best_of(tmp_path, 2, score_name="acc")
    saved_by(checkpoint, 5, [0.5, 0.25, 0.75, 0.5, 0.123456])
    assert names(tmp_path) == ["best_2_acc=0.5000.pt", "best_6_acc=0.7500.pt"]


@pytest.mark.parametrize("scores", [[float("nan")] * 2 + [0.1], [0.1, float("nan"), float("nan")]])
def test_nan_is_never_best(tmp_path: Path, scores: list[float]) -> None:
    checkpoint = best_of(tmp_path, 1)
    saved_by(checkpoint, 3, scores)
    assert [one.score for one in checkpoint.saved] == [0.1]
    assert len(names(tmp_path)) == 1


def test_torch_load_reads_it_without_running_a_pickle(tmp_path: Path) -> None:
    model, trainer = nn.Linear(2, 3), Engine(lambda engine, batch: batch)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint({"model": model, "optimizer": optimizer, "trainer": trainer}, tmp_path)
    trainer.on(Events.ITERATION_COMPLETED(once=3), checkpoint)
    trainer.run([0, 1], max_epochs=2)
    loaded = torch.load(tmp_path / "checkpoint_3.pt", weights_only=True)
    assert loaded.keys() == {"model", "optimizer", "trainer", "dengine"}
    assert torch.equal(loaded["model"]["weight"], model.weight)
    assert loaded["dengine"]["world_size"] == 1
    resumed = Engine(lambda engine, batch: batch)
    resumed.load_state_dict(loaded["trainer"])
    seen: list[int] = []
    resumed.on(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output))
    resumed.run([0, 1], max_epochs=2)
    assert seen == [1]


def test_a_compiled_model_is_saved_without_its_wrapper(tmp_path: Path) -> None:
    checkpoint = Checkpoint({"model": torch.compile(nn.Linear(1, 1))}, tmp_path)
    saved_by(checkpoint, 1)
    assert torch.load(tmp_path / "checkpoint_2.pt")["model"].keys() == {"weight", "bias"}


def test_the_step_is_what_the_transform_gives_for_the_event(tmp_path: Path) -> None:
    seen: list[Any] = []

    def step(engine: Engine, event: Any) -> int:
        seen.append(event)
        return engine.state.epoch + 100

    saved_by(Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, "c", 5, global_step_transform=step), 2)
    assert names(tmp_path) == ["c_100.pt", "c_101.pt"]
    assert seen == [Events.EPOCH_COMPLETED] * 2


def test_checkpoints_in_one_folder_prune_only_their_own(tmp_path: Path) -> None:
    trainer = Engine(lambda engine, batch: batch)
    model = nn.Linear(1, 1)
    trainer.on(Events.EPOCH_COMPLETED, Checkpoint({"model": model}, tmp_path, "best"))
    score = Checkpoint({"model": model}, tmp_path, "best", score_function=lambda e: -e.state.epoch, score_name="s")
    trainer.on(Events.EPOCH_COMPLETED, score)
    trainer.run([0], max_epochs=3)
    assert names(tmp_path) == ["best_1_s=0.0000.pt", "best_3.pt"]


def test_a_step_saved_twice_is_one_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, n_saved=2)
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.EPOCH_COMPLETED | Events.COMPLETED, checkpoint)
    trainer.run([0], max_epochs=2)
    assert names(tmp_path) == ["checkpoint_1.pt", "checkpoint_2.pt"]


def test_a_save_that_fails_leaves_everything_as_it_was_and_says_why(tmp_path: Path) -> None:
    objects: dict[str, Any] = {"model": nn.Linear(1, 1), "other": nn.Linear(1, 1)}
    checkpoint = Checkpoint(objects, tmp_path)
    saved_by(checkpoint, 1)
    before = (tmp_path / "checkpoint_2.pt").read_bytes()
    checkpoint._objects["other"] = Unsavable()
    with pytest.raises(
        CheckpointError, match=r"checkpoint_2\.pt could not be saved, and nothing was changed: .*lambda"
    ):
        saved_by(checkpoint, 2)
    assert names(tmp_path) == ["checkpoint_2.pt"]
    assert (tmp_path / "checkpoint_2.pt").read_bytes() == before
    assert checkpoint.last_path == tmp_path / "checkpoint_2.pt"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_in_the_middle_keeps_the_last_good_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path)
    saved_by(checkpoint, 1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.ITERATION_COMPLETED(once=5), checkpoint)
    with pytest.raises(CheckpointError, match="No space left on device"):
        trainer.run(range(9))
    assert [name for name in names(tmp_path) if name.endswith(".pt")] == ["checkpoint_2.pt"]
    assert [one.step for one in checkpoint.saved] == [2]


def test_the_old_file_goes_only_after_the_new_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    for name in ("fsync", "replace", "unlink"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real, **kw: (log.append(name), real(*args, **kw))[1]
        )
    saved_by(Checkpoint({"model": nn.Linear(1, 1)}, tmp_path), 2)
    # The file and the manifest are on the disk before either gets its name; the folder after each.
    save = ["fsync", "fsync", "replace", "fsync", "replace", "fsync"]
    assert log == [*save, *save, "unlink"]


def test_a_file_of_a_failing_score_function_is_the_users_own_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="s"):
        saved_by(best_of(tmp_path, 1), 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (({},), {}, ValueError, "at least one object"),
        ((["model"],), {}, TypeError, "takes a dict such as"),
        (({"model": 3},), {}, TypeError, "'model' cannot be saved: a int has no state_dict()"),
        (({"dengine": nn.Linear(1, 1)},), {}, ValueError, "reserved"),
        (({1: nn.Linear(1, 1)},), {}, TypeError, "must be strings"),
        (({"m": nn.Linear(1, 1)},), {"n_saved": 0}, ValueError, "n_saved=0 must be at least 1"),
        (({"m": nn.Linear(1, 1)},), {"score_name": "acc"}, ValueError, "no score_function"),
        (({"m": nn.Linear(1, 1)},), {"filename_prefix": "a/b"}, ValueError, "'a/b' becomes part of a file's name"),
    ],
)
def test_wrong_arguments_are_named_at_once(
    tmp_path: Path, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Checkpoint(*arguments, tmp_path / "never made", **options)  # type: ignore[call-arg]
    assert names(tmp_path) == []


# -- after a restart ---------------------------------------------------------------------------------------------


def test_a_restarted_run_goes_on_pruning_what_the_first_one_saved(tmp_path: Path) -> None:
    model, trainer = nn.Linear(1, 1), Engine(lambda engine, batch: batch)
    objects = {"model": model, "trainer": trainer}
    trainer.on(Events.EPOCH_COMPLETED, Checkpoint(objects, tmp_path, n_saved=2))
    trainer.run([0], max_epochs=3)
    assert Checkpoint.resume(tmp_path, objects) == tmp_path / "checkpoint_3.pt"
    resumed = Engine(lambda engine, batch: batch)
    objects = {"model": model, "trainer": resumed}
    checkpoint = Checkpoint(objects, tmp_path, n_saved=2)
    resumed.on(Events.EPOCH_COMPLETED, checkpoint)
    Checkpoint.resume(tmp_path, objects)
    resumed.run([0], max_epochs=4)
    assert names(tmp_path) == ["checkpoint_3.pt", "checkpoint_4.pt"]
    assert [one.step for one in checkpoint.saved] == [3, 4]


def test_the_best_score_goes_on_after_a_restart_and_of_several_in_a_folder_each_its_own(tmp_path: Path) -> None:
    saved_by(best_of(tmp_path, 1, score_name="acc"), 2, [0.5, 0.75])
    saved_by(best_of(tmp_path, 1, score_name="f1"), 1, [0.25])
    saved_by(Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, "best"), 1)
    before = names(tmp_path)
    assert before == ["best_2.pt", "best_2_f1=0.2500.pt", "best_4_acc=0.7500.pt"]
    saved_by(best_of(tmp_path, 1, score_name="acc"), 2, [0.5, 0.7])
    assert names(tmp_path) == before
    saved_by(best_of(tmp_path, 1, score_name="acc"), 2, [0.5, 0.8])
    assert names(tmp_path) == ["best_2.pt", "best_2_f1=0.2500.pt", "best_4_acc=0.8000.pt"]


def test_a_run_that_begins_anew_in_the_folder_of_a_longer_one_keeps_its_own_and_is_told(tmp_path: Path) -> None:
    saved_by(Checkpoint({"model": nn.Linear(1, 1)}, tmp_path), 5)
    with pytest.warns(UserWarning, match=r"ahead of this run's step 2: checkpoint_10\.pt"):
        saved_by(Checkpoint({"model": nn.Linear(1, 1)}, tmp_path), 1)
    assert names(tmp_path) == ["checkpoint_2.pt"]


# -- asynchronous ------------------------------------------------------------------------------------------------


def slowed(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    """Each file reaches the disk only once `gate` is set."""
    real = os.fsync

    def slow(descriptor: int) -> None:
        assert gate.wait(120), "nobody opened the gate"
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_what_is_saved_is_of_the_moment_although_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    gate, real = threading.Event(), getattr(os, call)
    monkeypatch.setattr(os, call, lambda *given: (gate.wait(120), real(*given))[1])
    model = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def step(engine: Engine, batch: int) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 300)).sum().backward()
        optimizer.step()

    trainer = Engine(step)
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
    trainer.on(Events.ITERATION_COMPLETED(once=2), Checkpoint(objects, tmp_path, asynchronous=True))
    expected: dict[str, torch.Tensor] = {}

    @trainer.on(Events.ITERATION_COMPLETED(once=2), priority=5)
    def remember(engine: Engine) -> None:
        expected.update(weight=model.weight.detach().clone(), bias=model.bias.detach().clone())
        expected["momentum"] = optimizer.state_dict()["state"][0]["momentum_buffer"].clone()

    @trainer.on(Events.ITERATION_COMPLETED(once=5))
    def open_gate(engine: Engine) -> None:
        assert not (tmp_path / "checkpoint_2.pt").exists()
        gate.set()

    trainer.run(range(6))
    loaded = torch.load(tmp_path / "checkpoint_2.pt", weights_only=True)
    assert not torch.equal(model.weight, expected["weight"])
    assert torch.equal(loaded["model"]["weight"], expected["weight"])
    assert torch.equal(loaded["model"]["bias"], expected["bias"])
    assert torch.equal(loaded["optimizer"]["state"][0]["momentum_buffer"], expected["momentum"])
    assert loaded["trainer"]["iteration"] == 2


def test_a_save_that_comes_while_one_is_running_waits_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    slowed(monkeypatch, gate)
    result = Writing.result

    def awaited(writing: Writing[Any]) -> Any:
        gate.set()
        try:
            return result(writing)
        finally:
            gate.clear()

    monkeypatch.setattr(Writing, "result", awaited)
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, n_saved=9, asynchronous=True)
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.ITERATION_COMPLETED, checkpoint)
    with pytest.warns(UserWarning, match="is still being written") as caught:
        trainer.run(range(4))
    assert sum("is still being written" in str(each.message) for each in caught) == 1
    assert [one.step for one in checkpoint.saved] == [1, 2, 3, 4]
    assert len(names(tmp_path)) == 4


def test_a_score_that_is_not_kept_does_not_wait_for_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    slowed(monkeypatch, gate)
    checkpoint = best_of(tmp_path, 1, asynchronous=True)
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.update(s=-engine.state.output))
    trainer.on(Events.ITERATION_COMPLETED, checkpoint)
    trainer.on(Events.ITERATION_COMPLETED(once=3), lambda engine: gate.set())
    trainer.run(range(4))
    assert names(tmp_path) == ["best_1_score=0.0000.pt"]


@pytest.mark.parametrize("event", [Events.COMPLETED, Events.EPOCH_COMPLETED, Events.TERMINATED | Events.COMPLETED])
def test_a_run_ends_only_when_the_last_write_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: Any
) -> None:
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.1), real(descriptor))[1])
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, asynchronous=True)
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(event, checkpoint)
    trainer.run(range(3))
    assert names(tmp_path) == ["checkpoint_3.pt"]
    assert checkpoint.last_path == tmp_path / "checkpoint_3.pt"
    assert [thread for thread in threading.enumerate() if "dengine-checkpoint" in thread.name] == []


def test_a_run_that_raises_waits_for_the_write_and_raises_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(engine: Engine, batch: int) -> None:
        if batch == 2:
            raise ZeroDivisionError("the run's own")

    for fails, there in ((False, ["checkpoint_2.pt"]), (True, [])):
        folder = tmp_path / str(fails)
        trainer = Engine(step)
        trainer.on(Events.ITERATION_COMPLETED(once=2), Checkpoint({"m": nn.Linear(1, 1)}, folder, asynchronous=True))
        real = os.fsync

        def late(descriptor: int, fails: bool = fails, real: Any = real) -> None:
            time.sleep(0.1)
            if fails:
                raise OSError(5, "Input/output error")
            real(descriptor)

        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(os, "fsync", late)
            with pytest.raises(ZeroDivisionError, match="the run's own"):
                trainer.run(range(4))
        assert (names(folder) if folder.exists() else []) == there
        assert any("Input/output error" in str(each.message) for each in caught) == fails


def test_a_failed_write_is_raised_once_and_the_next_run_saves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, asynchronous=True)
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.ITERATION_COMPLETED(once=2), checkpoint)

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"checkpoint_2\.pt could not be saved.*No space left"):
            trainer.run(range(4))
    assert names(tmp_path) == []
    trainer.run(range(4))
    assert names(tmp_path) == ["checkpoint_2.pt"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("score_function", 3), ("global_step_transform", 3), ("filename_prefix", 3), ("score_name", 3), ("save_dir", 3)],
)
def test_an_argument_of_a_wrong_type_is_named_at_once(tmp_path: Path, argument: str, value: Any) -> None:
    options: dict[str, Any] = {"save_dir": tmp_path, "score_function": lambda engine: 1.0, argument: value}
    with pytest.raises(TypeError, match=f"{argument}=3 "):
        Checkpoint({"model": nn.Linear(1, 1)}, **options)


@pytest.mark.parametrize("score", [None, torch.ones(2), "0.5", "high"])
def test_a_score_that_is_no_number_saves_nothing(tmp_path: Path, score: Any) -> None:
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, score_function=lambda engine: score)
    with pytest.raises(TypeError, match="score_function gave .* but a Checkpoint compares one number a call"):
        saved_by(checkpoint, 1)
    assert list(tmp_path.iterdir()) == []
