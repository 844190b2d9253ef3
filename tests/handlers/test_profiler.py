"""Which files are there after a run, and that each can be read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dengine import Engine
from dengine.handlers import Profiler


def step(engine: Engine, batch: int) -> None:
    torch.ones(4).add_(1 / batch)


def traces(folder: Path, batches: list[int], max_epochs: int = 1, **options: Any) -> list[str]:
    trainer, profiler = Engine(step), Profiler(folder / "new", **options)
    profiler.attach(trainer)
    try:
        trainer.run(batches, max_epochs=max_epochs)
    finally:
        for path in profiler.paths:
            events = json.loads(path.read_text())["traceEvents"]
            assert "aten::add_" in {event.get("name") for event in events}
    names = sorted(path.name for path in (folder / "new").iterdir()) if (folder / "new").exists() else []
    assert names == sorted(path.name for path in profiler.paths)
    return names


@pytest.mark.parametrize(
    ("num_batches", "max_epochs", "options", "names"),
    [
        (10, 1, {"wait": 1, "warmup": 1, "active": 2}, ["trace_3-4.json"]),
        (4, 3, {"wait": 1, "warmup": 1, "active": 2, "repeat": 2}, ["trace_3-4.json", "trace_7-8.json"]),
        (4, 2, {"wait": 0, "warmup": 1, "active": 2, "repeat": 0}, [f"trace_{n}.json" for n in ("2-3", "5-6", "8-8")]),
        (4, 1, {"wait": 1, "warmup": 0, "active": 9}, ["trace_2-4.json"]),  # the run ends within the window
        (2, 1, {"wait": 1, "warmup": 1, "active": 9}, []),  # ... before it
        (1, 1, {"wait": 5}, []),
    ],
)  # fmt: skip
def test_a_file_a_window_of_the_iterations_that_it_names(
    tmp_path: Path, num_batches: int, max_epochs: int, options: dict[str, Any], names: list[str]
) -> None:
    assert traces(tmp_path, [1] * num_batches, max_epochs, **options) == names


def test_a_run_that_fails_within_a_window_leaves_a_whole_file(tmp_path: Path) -> None:
    trainer, profiler = Engine(step), Profiler(tmp_path, wait=0, warmup=1, active=9)
    profiler.attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.run([1, 1, 1, 0])
    assert [path.name for path in tmp_path.iterdir()] == ["trace_2-3.json"]
    assert json.loads(profiler.paths[0].read_text())["traceEvents"]
    trainer.run([1, 1])  # and the next run is profiled anew
    assert [path.name for path in profiler.paths] == ["trace_2-3.json", "trace_2-2.json"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, path: str) -> None:
        Path(path).write_text("{half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    with pytest.raises(OSError, match="No space left"):
        traces(tmp_path, [1] * 5, wait=0, warmup=0, active=2)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error"), [({"active": 0}, ValueError), ({"wait": -1}, ValueError), ({"repeat": 1.5}, TypeError)]
)
def test_wrong_counts_are_named(tmp_path: Path, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        Profiler(tmp_path, **options)
