"""`Checkpoint(placement="node")` and `resume([fast, safe])` in one process: what is refused, which one is newest."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.checkpoint.disk import owner
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.handlers import Checkpoint

HOLD = """
import sys, time
from pathlib import Path
from dengine.checkpoint.disk.owner import take_over
take_over(Path(sys.argv[1]))
print("mine", flush=True)
time.sleep(600)
"""


def trained(folders: dict[str, Any], num_batches: int = 6) -> tuple[dict[str, Any], list[Checkpoint]]:
    model = nn.Linear(2, 1)
    trainer = Engine(lambda engine, batch: model.weight.data.add_(batch))
    objects = {"model": model, "trainer": trainer}
    checkpoints = []
    for folder, (every, options) in folders.items():
        checkpoints.append(Checkpoint(objects, folder, **options))
        trainer.on(Events.ITERATION_COMPLETED(every=every), checkpoints[-1])
    trainer.run(range(1, 1 + num_batches), max_epochs=1)
    return objects, checkpoints


def fresh() -> dict[str, Any]:
    return {"model": nn.Linear(2, 1), "trainer": Engine(lambda engine, batch: None)}


def resumed(places: Any, **options: Any) -> Path | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*on one file system")
        return Checkpoint.resume(places, fresh(), **options)


def test_the_newest_of_all_folders_counts_and_a_damaged_one_falls_back(tmp_path: Path) -> None:
    fast, safe = tmp_path / "fast", tmp_path / "safe"
    node = {"placement": "node", "asynchronous": True, "n_saved": 2}
    _, (first, _) = trained({str(fast): (2, node), str(safe): (5, {"n_saved": 2})})
    assert [each.path.name for each in first.saved] == ["checkpoint_4.pt", "checkpoint_6.pt"]
    assert repr(first).endswith("asynchronous=True, placement='node')")
    assert resumed([fast, safe]) == fast / "checkpoint_6.pt"
    assert resumed([safe, fast]) == fast / "checkpoint_6.pt"
    assert resumed([str(safe)]) == safe / "checkpoint_5.pt"
    (fast / "checkpoint_6.pt").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"Resuming from .*safe/checkpoint_5.pt, as .*checkpoint_6.pt"):
        assert resumed([fast, safe]) == safe / "checkpoint_5.pt"
    for path in [*fast.glob("*.pt"), *safe.glob("*.pt")]:
        path.write_bytes(b"nothing")
    with pytest.raises(CorruptCheckpointError, match="is intact"):
        resumed([fast, safe])


def test_an_equal_step_is_taken_from_the_first_and_nothing_gives_none(tmp_path: Path) -> None:
    fast, safe = tmp_path / "fast", tmp_path / "safe"
    assert resumed([fast, safe]) is None
    trained({str(fast): (3, {"placement": "node"}), str(safe): (3, {})})
    assert resumed([fast, safe]) == fast / "checkpoint_6.pt"
    assert resumed([safe, fast]) == safe / "checkpoint_6.pt"


def test_a_pair_has_a_prefix_of_its_own(tmp_path: Path) -> None:
    fast, safe = tmp_path / "fast", tmp_path / "safe"
    trained({str(fast): (4, {"placement": "node", "filename_prefix": "quick"}), str(safe): (3, {})}, num_batches=5)
    assert resumed([(fast, "quick"), safe]) == fast / "quick_4.pt"
    assert resumed([(fast, "quick"), (safe, "other")]) == fast / "quick_4.pt"
    with pytest.warns(UserWarning, match="hold no checkpoint 'checkpoint'.*'quick'"):
        assert resumed([fast]) is None


@pytest.mark.parametrize(
    ("places", "error"),
    [([], TypeError), (3, TypeError), ([3], TypeError), ([("a", 3)], TypeError), ([("a", "b", "c")], TypeError)],
)
def test_a_list_of_something_else_is_refused(places: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="save_dir"):
        resumed(places)


def test_a_checkpoint_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="On node 0.*is a checkpoint, not a folder"):
        resumed([tmp_path / "checkpoint_6.pt", tmp_path])


def test_another_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="placement='memory' must be one of 'shared', 'node'"):
        Checkpoint(fresh(), "folder", placement="memory")  # type: ignore[arg-type]


def test_a_folder_without_room_is_refused_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=2, f_frsize=10_000_000))
    model = nn.Linear(1000, 2000)
    trainer = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint({"model": model, "trainer": trainer}, tmp_path / "fast", placement="node", n_saved=2)
    trainer.on(Events.ITERATION_COMPLETED, checkpoint)
    told = r"on node 0 .rank 0., .*/fast has room for 20.0 MB, and needs 24.1 MB: 2 to keep, and one while it is "
    with pytest.raises(CheckpointError, match=told + "written, of 8.0 MB each.*n_saved=1"):
        trainer.run([0])
    assert list((tmp_path / "fast").glob("*.pt")) == []


def test_a_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder .*/none for fast: every node needs it"):
        trained({str(tmp_path / "none" / "fast"): (1, {"placement": "node"})})
    assert not (tmp_path / "none").exists()


def test_a_folder_of_a_living_job_is_refused_and_that_of_a_killed_one_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "_PATIENCE_S", 0.1)
    fast = tmp_path / "fast"
    environment = {**os.environ, "SLURM_JOB_ID": "4711"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(fast)], stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "mine\n"
            told = f"in use by another job .job 4711, process {other.pid} on .*its own folder"
            with pytest.raises(CheckpointError, match=told):
                trained({str(fast): (1, {"placement": "node"})})
            with pytest.raises(CheckpointError, match=told):
                resumed([fast, tmp_path / "safe"])
        finally:
            other.kill()
    trained({str(fast): (1, {"placement": "node"}), f"{fast}/": (2, {"placement": "node", "filename_prefix": "b"})})
    assert sorted(path.name for path in fast.glob("*.pt")) == ["b_6.pt", "checkpoint_6.pt"]


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    fast = tmp_path / "fast"
    for _ in range(2):
        trained({str(fast): (1, {"placement": "node"})})
        for path in [*fast.iterdir()]:
            path.unlink()
        fast.rmdir()


def test_two_folders_on_one_file_system_are_a_warning(tmp_path: Path) -> None:
    fast, safe = tmp_path / "fast", tmp_path / "safe"
    with pytest.warns(UserWarning, match=re.escape(f"{fast} and {safe} are on one file system")):
        Checkpoint.resume([fast, safe], fresh())
    trained({str(safe): (3, {}), str(tmp_path / "old"): (3, {})})
    with warnings.catch_warnings():  # neither is one for copies
        warnings.simplefilter("error")
        Checkpoint.resume([safe, tmp_path / "old"], fresh())
        Checkpoint.resume([(safe, "checkpoint"), (safe, "best")], fresh())


def test_training_goes_on_from_the_copy(tmp_path: Path) -> None:
    fast = tmp_path / "fast"
    objects, _ = trained({str(fast): (2, {"placement": "node"})}, num_batches=5)
    again = fresh()
    Checkpoint.resume([fast], again)
    assert again["trainer"].state.iteration == 4
    assert torch.equal(again["model"].weight + 5, objects["model"].weight)
