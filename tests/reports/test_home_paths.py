"""`~` is the home folder in every path that a user gives."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dengine import Engine, Events
from dengine.__main__ import main
from dengine.checkpoint import latest, load, save, verify
from dengine.checks import path_of
from dengine.config import Conf
from dengine.handlers import Checkpoint, Profiler
from dengine.tracking import Track


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    (tmp_path / "elsewhere").mkdir()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


def test_checkpoints_by_hand_and_by_handler(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects: dict[str, Any] = {"model": nn.Linear(1, 1)}
    save("~/runs/c_1.pt", objects)
    assert (home / "runs" / "c_1.pt").is_file()
    load("~/runs/c_1.pt", objects)
    load(Path("~/runs/c_1.pt"), objects)
    assert verify("~/runs/c_1.pt").step == 1
    assert latest("~/runs", "c") == home / "runs" / "c_1.pt"
    assert Checkpoint.resume("~/runs", objects, "c") == home / "runs" / "c_1.pt"
    trainer = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint(objects, "~/more")
    trainer.on(Events.COMPLETED, checkpoint)
    trainer.run([1])
    assert checkpoint.last_path == home / "more" / "checkpoint_1.pt"
    assert main(["inspect", "~/more"]) == 0
    assert "checkpoint_1.pt" in capsys.readouterr().out
    assert list(Path().iterdir()) == []


def test_tracking_profiles_and_settings(home: Path) -> None:
    with Track.run("p", dir="~/runs") as run:
        (home / "note.txt").write_text("x")
        artifact = Track.Artifact("a", "text").add_file("~/note.txt")
        run.log_artifact(artifact)
        run.log({"x": 1.0}, step=1)
        assert run.use_artifact("a:v0").download("~/copy") == home / "copy"
    assert Path(run.dir).is_relative_to(home / "runs")
    (home / "c.json").write_text(json.dumps({"lr": 1}))
    assert Conf.load("~/c.json").lr == 1
    assert Profiler("~/traces")._dir == home / "traces"
    pytest.importorskip("matplotlib")
    assert main(["plot", f"~/{Path(run.dir).relative_to(home)}", "-o", "~/curves.png"]) == 0
    assert (home / "curves.png").is_file()
    assert list(Path().iterdir()) == []


def test_a_user_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="save_dir='~nobody-here/x'"):
        path_of("save_dir", "~nobody-here/x")
    assert path_of("save_dir", "./~nobody-here") == Path("~nobody-here")
    with pytest.raises(SystemExit):
        main(["inspect", "~nobody-here/x"])
