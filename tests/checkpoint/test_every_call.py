"""Ctrl-C and a disk that fails, at each call to the system that a save makes: what is there afterwards is whole."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.checkpoint import load, save, verify
from dengine.checkpoint.catalogue import manifest
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint

CALLS = ("open", "write", "writev", "pwrite", "fsync", "close", "rename", "replace", "unlink", "mkdir", "scandir")


class Blown:
    """`os`, in which call number `at` is where `error` is raised, before it is made or after."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, when: str, error: BaseException) -> None:
        self.count = 0
        for name in CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name), at, when, error))

    def _counted(self, call: Callable[..., Any], at: int, when: str, error: BaseException) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            is_it = self.count == at
            if is_it and when == "before":
                raise error
            try:
                return call(*arguments, **options)
            finally:
                if is_it:
                    raise error

        return counted


def filled(value: float) -> nn.Linear:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def value_of(model: nn.Linear) -> float:
    (value,) = {float(each) for parameter in model.parameters() for each in parameter.detach().flatten()}
    return value


def check_listing(folder: Path) -> None:
    """The manifest lists nothing that is not there, and what is there proves itself."""
    found = manifest.scan(folder)
    assert (found.lost, found.damaged, found.unknown) == ((), (), ())
    for entry in found.entries:
        verify(folder / entry.name)


def trained(folder: Path, model: nn.Linear, *, num_epochs: int) -> Callable[[], Any]:
    """A run that fills the model with the number of its iteration, and saves it under two prefixes."""
    trainer = Engine(lambda engine, batch: model.load_state_dict(filled(batch).state_dict()))
    handlers = [Checkpoint({"model": model, "trainer": trainer}, folder, prefix) for prefix in ("best", "checkpoint")]
    for handler in handlers:
        trainer.on(Events.ITERATION_COMPLETED, handler)
    return lambda: trainer.run([1.0, 2.0], max_epochs=num_epochs)


def num_calls(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    with monkeypatch.context() as patch:
        blown = Blown(patch, 0, "before", KeyboardInterrupt())
        work()
    return blown.count


@pytest.mark.filterwarnings("ignore:.*manifest.json is missing. it is rebuilt from the intact files:UserWarning")
@pytest.mark.filterwarnings("ignore:.* holds checkpoints that are ahead of this run's step:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_at_any_call_of_a_run_leaves_what_can_be_resumed(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = num_calls(monkeypatch, trained(tmp_path / "0", filled(0), num_epochs=1))
    assert total > 40
    resumed_at = []
    for at in range(1, total + 1):
        folder, model = tmp_path / str(at), filled(0)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Blown(patch, at, when, KeyboardInterrupt())
            trained(folder, model, num_epochs=1)()
        check_listing(folder)
        resumed, trainer = filled(0), Engine(lambda engine, batch: None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*holds no checkpoint 'checkpoint'")
            path = Checkpoint.resume(folder, {"model": resumed, "trainer": trainer})
        assert value_of(resumed) == trainer.state.iteration
        assert path is None or path.name == f"checkpoint_{trainer.state.iteration}.pt"
        resumed_at.append(trainer.state.iteration)
        # A run that begins anew in this folder clears up.
        trained(folder, filled(0), num_epochs=1)()
        names = sorted(each.name for each in folder.iterdir())
        assert names == ["best_2.pt", "checkpoint_2.pt", "manifest.json"]
    assert resumed_at == sorted(resumed_at)  # nothing that was safe is lost by a later call
    assert set(resumed_at) == {0, 1, 2}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_goes_on_pruning_after_an_interrupt(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where an interrupt ends a cell and the objects stay."""

    def saved(folder: Path) -> tuple[Checkpoint, Callable[[range], Any]]:
        trainer = Engine(lambda engine, batch: None)
        checkpoint = Checkpoint({"model": filled(0)}, folder, global_step_transform=lambda e, event: e.state.batch)
        trainer.on(Events.ITERATION_COMPLETED, checkpoint)
        trainer.run(range(1, 3))
        return checkpoint, trainer.run

    _, go_on = saved(tmp_path / "0")
    total = num_calls(monkeypatch, lambda: go_on(range(3, 4)))
    for at in range(1, total + 1):
        folder = tmp_path / str(at)
        checkpoint, go_on = saved(folder)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Blown(patch, at, when, KeyboardInterrupt())
            go_on(range(3, 4))
        assert checkpoint.saved[-1].path == checkpoint.last_path
        go_on(range(4, 6))
        assert [one.step for one in checkpoint.saved] == [5]
        assert sorted(each.name for each in folder.iterdir()) == ["checkpoint_5.pt", "manifest.json"]


@pytest.mark.parametrize("ending", [".pt", ""])
@pytest.mark.parametrize("name", ["c_1", "c_2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_at_any_call_of_a_save_by_hand_leaves_the_old_or_the_new(
    when: str, name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`c_1` is there already, and is replaced; `c_2` is new."""
    save(tmp_path / "0" / f"c_1{ending}", {"model": filled(1)})
    total = num_calls(monkeypatch, lambda: save(tmp_path / "0" / f"{name}{ending}", {"model": filled(2)}))
    values = []
    for at in range(1, total + 1):
        folder, resumed = tmp_path / str(at), filled(0)
        save(folder / f"c_1{ending}", {"model": filled(1)})
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Blown(patch, at, when, KeyboardInterrupt())
            save(folder / f"{name}{ending}", {"model": filled(2)})
        assert Checkpoint.resume(folder, {"model": resumed}, "c") is not None
        check_listing(folder)
        values.append(value_of(resumed))
    assert values == sorted(values)
    assert set(values) == {1, 2}


@pytest.mark.parametrize("ending", [".pt", ""])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_disk_that_fails_at_any_call_of_a_save_changes_nothing(
    when: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "0" / f"c_1{ending}", {"model": filled(1)})
    total = num_calls(monkeypatch, lambda: save(tmp_path / "0" / f"c_2{ending}", {"model": filled(2)}))
    outcomes = []
    for at in range(1, total + 1):
        folder, model, failure = tmp_path / str(at), filled(0), ""
        save(folder / f"c_1{ending}", {"model": filled(1)})
        with monkeypatch.context() as patch:
            Blown(patch, at, when, OSError(5, "Input/output error"))
            try:
                save(folder / f"c_2{ending}", {"model": filled(2)})
            except CheckpointError as error:
                failure = str(error)
        check_listing(folder)
        load(folder / f"c_1{ending}", {"model": model})
        assert value_of(model) == 1
        assert (folder / f"c_2{ending}").exists() == (failure == "")
        if failure:
            assert "nothing was changed" in failure
            assert "Input/output error" in failure
        else:
            load(folder / f"c_2{ending}", {"model": model})
            assert value_of(model) == 2
        outcomes.append(failure != "")
    assert sum(outcomes) > total / 2
