"""What a run leaves on the disk, however it ends."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dengine.tracking import Run, Track, TrackingError


@pytest.fixture(autouse=True)
def online() -> Iterator[None]:
    yield
    Track.set_mode("online")


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]


def read(run_dir: Path, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run_dir / f"{name}.json").read_text())
    return value


def start_script(code: str, folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that opens `run`, tells its folder, runs `code`, and is waited for until it prints "ready"."""
    script = (
        "import sys, os, time, signal\nfrom dengine.tracking import Track\n"
        f"run = Track.run('p', dir={str(folder)!r})\nprint(run.dir, flush=True)\n{code}"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


# -- rows --------------------------------------------------------------------------------------------------------


def test_a_row_is_in_the_file_when_log_returns_and_survives_a_kill(tmp_path: Path) -> None:
    code = "for step in range(200): run.log({'loss': step})\nprint('ready', flush=True)\ntime.sleep(600)"
    process, run_dir = start_script(code, tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(200))
    assert read(run_dir, "status")["status"] == "running"


def test_a_row_has_a_step_a_time_and_its_values(tmp_path: Path) -> None:
    before = time.time()
    with Track.run("p", dir=tmp_path) as run:
        run.log({"train/loss": 0.5, "epoch": 3}, step=10)
    (row,) = rows_of(run)
    assert list(row) == ["step", "time", "train/loss", "epoch"]
    assert (row["step"], row["train/loss"], row["epoch"]) == (10, 0.5, 3)
    assert before <= row["time"] <= time.time()


def test_without_a_step_they_count_on_and_a_step_may_go_back(tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path) as run:
        steps: list[Any] = [None, None, 10, None, 3, np.int64(4), torch.tensor(5)]
        for step in steps:
            run.log({"x": 1}, step=step)
    assert [row["step"] for row in rows_of(run)] == [0, 1, 10, 11, 3, 4, 5]


def test_numbers_that_are_not_finite_are_strings_in_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    with Track.run("p", dir=tmp_path) as run:
        run.log({"a": math.nan, "b": math.inf, "c": {"d": torch.tensor(-math.inf)}, "e": 1})
    (line,) = (run.dir / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert [row[name] for name in ("a", "b", "c/d", "e")] == ["NaN", "Infinity", "-Infinity", 1]


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor(3), 3),
        (torch.tensor(True), True),
        (torch.tensor([0.25], dtype=torch.bfloat16, requires_grad=True), 0.25),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(7), 7),
        (np.array(2.0), 2.0),
        ("warm-up", "warm-up"),
        (False, False),
    ],
)
def test_scalars_of_any_kind_become_plain_ones(value: Any, recorded: Any, tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path) as run:
        run.log({"x": {"y": value}})
    found = rows_of(run)[0]["x/y"]
    assert found == recorded
    assert type(found) is type(recorded)


@pytest.mark.parametrize(
    ("values", "step", "error", "message"),
    [
        ({"a": {"b": 1}, "a/b": 2}, None, ValueError, "two values named 'a/b'"),
        ({"step": 1}, None, ValueError, "pass step="),
        ({"time": 1}, None, ValueError, "under another name"),
        ([("a", 1)], None, TypeError, "takes a dict"),
        ({"a": 1}, 1.5, TypeError, "step=1.5 must be a whole number"),
        ({"a": 1}, True, TypeError, "step=True must be a whole number"),
    ],
)
def test_what_is_no_row_is_refused_and_nothing_is_written(
    values: Any, step: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with Track.run("p", dir=tmp_path) as run:
        with pytest.raises(error, match=message):
            run.log(values, step=step)
        assert rows_of(run) == []
        assert run.summary == {}
        run.log({"a": 1})
    assert rows_of(run)[0]["step"] == 0


def test_rows_that_meet_a_full_disk_are_written_later_and_half_a_row_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare_write = os.write
    room = [20]

    def write(descriptor: int, data: bytes) -> int:
        if not room:
            return bare_write(descriptor, data)
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = bare_write(descriptor, data[: room[0]])
        room[0] = 0
        return written

    run = Track.run("p", dir=tmp_path)
    monkeypatch.setattr(os, "write", write)
    with pytest.warns(RuntimeWarning, match="No space left on device.*kept in memory"):
        run.log({"x": 0})
    run.log({"x": 1})
    assert (run.dir / "metrics.jsonl").read_bytes() == b""
    room.clear()
    run.log({"x": 2})
    assert [row["x"] for row in rows_of(run)] == [0, 1, 2]
    run.finish()


# -- configuration and summary -----------------------------------------------------------------------------------


@dataclass
class Settings:
    lr: float
    path: Path


@pytest.mark.parametrize(
    ("config", "recorded"),
    [
        ({"lr": torch.tensor(0.5), "n": {"k": np.int64(3)}}, {"lr": 0.5, "n": {"k": 3}}),
        ({"w": torch.zeros(2), "f": len}, {"w": "tensor([0., 0.])", "f": "<built-in function len>"}),
        (argparse.Namespace(lr=math.inf, sizes=(1, 2)), {"lr": "Infinity", "sizes": [1, 2]}),
        (Settings(0.1, Path("a/b")), {"lr": 0.1, "path": "a/b"}),
        ({1: None}, {"1": None}),
        (None, {}),
    ],
)
def test_any_configuration_is_recorded_as_json(config: Any, recorded: dict[str, Any], tmp_path: Path) -> None:
    with Track.run("p", config=config, dir=tmp_path) as run:
        assert read(run.dir, "config") == recorded


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a dict of settings"):
        Track.run("p", config=[1], dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_has_the_last_values_and_what_was_set(tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path) as run:
        run.log({"loss": 1.0})
        run.log({"loss": 0.5})
        run.summary["best"] = torch.tensor(2)
        run.config["late"] = 1
    assert read(run.dir, "summary") == {"loss": 0.5, "best": 2}
    assert read(run.dir, "config") == {"late": 1}


# -- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("bad batch"), KeyboardInterrupt(), SystemExit(3)])
def test_a_run_left_by_an_exception_is_failed_with_its_traceback(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), Track.run("p", dir=tmp_path) as run:
        run.log({"x": 1})
        raise error
    status = read(run.dir, "status")
    assert status["status"] == "failed"
    assert type(error).__name__ in status["error"]
    assert "raise error" in status["traceback"]
    assert len(rows_of(run)) == 1


@pytest.mark.parametrize("code", [None, 0])
def test_leaving_by_exit_with_success_finishes_it(code: int | None, tmp_path: Path) -> None:
    with pytest.raises(SystemExit), Track.run("p", dir=tmp_path) as run:
        sys.exit(code)
    assert read(run.dir, "status")["status"] == "finished"


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_run_ended_by_sigterm_is_failed(num_signals: int, tmp_path: Path) -> None:
    code = "with run:\n    print('ready', flush=True)\n    while True: time.sleep(0.01)"
    process, run_dir = start_script(code, tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(num_signals):
        process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 143
    status = read(run_dir, "status")
    assert status["status"] == "failed"
    assert "SystemExit: 143" in status["error"]
    assert '"<string>", line' in status["traceback"]


def test_the_handler_of_sigterm_is_gone_after_the_run_and_one_that_was_there_stays(tmp_path: Path) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with Track.run("p", dir=tmp_path):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    own = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGTERM, own)
    try:
        with Track.run("p", dir=tmp_path):
            assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(("code", "status"), [("", "finished"), ("1 / 0", "failed")])
def test_a_script_that_forgets_to_finish_is_marked_as_it_ended(code: str, status: str, tmp_path: Path) -> None:
    process, run_dir = start_script(f"run.log({{'x': 1}})\n{code}", tmp_path)
    process.wait(600)
    found = read(run_dir, "status")
    assert found["status"] == status
    assert ("ZeroDivisionError" in found.get("traceback", "")) == bool(code)


def test_a_finished_run_takes_no_more_and_may_be_finished_again(tmp_path: Path) -> None:
    run = Track.run("p", dir=tmp_path)
    run.finish()
    run.finish()
    with pytest.raises(RuntimeError, match=f"is finished; Track.run\\(..., resume='{run.id}'\\)"):
        run.log({"x": 1})


def test_a_forked_child_that_leaves_the_block_does_not_end_the_run(tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path) as run:
        child = os.fork()
        if child == 0:
            try:
                run.finish()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert read(run.dir, "status")["status"] == "running"


# -- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (b'{"step": 0, "time": 1.0, "x": 1}\n{"step": 1, "ti', 1),
        (b'{"step": 0, "time": 1.0, "x": 1}\n{"step": 1, "time": 2.0, "x": 2}', 2),
        (b'{"st', 0),
        (b"", 0),
        (b'{"step": 0, "time": 1.0, "x": 1}\n{"a": "' + b"x" * 100_000, 1),
    ],
)
def test_half_a_line_of_a_killed_run_is_mended_when_it_is_resumed(left: bytes, kept: int, tmp_path: Path) -> None:
    first = Track.run("p", dir=tmp_path)
    first.finish()
    (first.dir / "metrics.jsonl").write_bytes(left)
    (first.dir / "summary.json").unlink()
    with Track.run("p", dir=tmp_path, resume=first.id) as run:
        assert run.summary == ({"x": kept} if kept else {})
        run.log({"y": 1})
    assert run.dir == first.dir
    assert [row["step"] for row in rows_of(run)] == list(range(kept + 1))


def test_a_resumed_run_keeps_its_name_and_lays_the_new_config_over_the_old(tmp_path: Path) -> None:
    with Track.run("p", "first try", {"a": 1, "n": {"b": 2, "c": 3}}, ["x"], tmp_path) as first:
        pass
    with Track.run("p", config={"n": {"b": 9}}, tags=["y"], dir=tmp_path, resume=first.id) as run:
        assert read(run.dir, "status")["status"] == "running"
    assert (run.name, run.id) == ("first try", first.id)
    assert read(run.dir, "config") == {"a": 1, "n": {"b": 9, "c": 3}}
    assert read(run.dir, "run")["tags"] == ["x", "y"]


def test_no_tags_may_be_none(tmp_path: Path) -> None:
    with Track.run("p", tags=None, dir=tmp_path) as first:
        pass
    with Track.run("p", tags=None, dir=tmp_path, resume=first.id) as run:
        assert read(run.dir, "run")["tags"] == []


def test_an_unknown_run_lists_those_there_are(tmp_path: Path) -> None:
    first = Track.run("p", dir=tmp_path)
    first.finish()
    with pytest.raises(ValueError, match=f"no run 'nothing' in .*there is '{first.id}'"):
        Track.run("p", dir=tmp_path, resume="nothing")


def test_a_run_that_another_process_records_cannot_be_resumed_until_that_has_ended(tmp_path: Path) -> None:
    process, run_dir = start_script("print('ready', flush=True)\ntime.sleep(600)", tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(TrackingError, match="is being written by another process"):
        Track.run("p", dir=tmp_path, resume=run_dir.name)
    process.kill()
    process.wait()
    Track.run("p", dir=tmp_path, resume=run_dir.name).finish()


def test_what_contains_itself_is_refused_by_name_and_the_run_still_ends(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["inner"] = [loop]
    knot: dict[str, Any] = {}
    knot["again"] = knot
    with pytest.raises(ValueError, match="'model' cannot be recorded: it contains itself"):
        Track.run("p", config={"model": loop}, dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    run = Track.run("p", dir=tmp_path)
    with pytest.raises(ValueError, match="'val' cannot be recorded: it contains itself"):
        run.log({"val": knot})
    run.summary |= {"before": 1, "tree": loop, "after": 2}
    with pytest.raises(ValueError, match="has ended, and its record lacks something: 'tree' cannot be recorded"):
        run.finish()
    assert read(run.dir, "status")["status"] == "finished"
    assert read(run.dir, "summary") == {"before": 1, "after": 2}
    assert rows_of(run) == []


def test_a_run_says_that_it_ended_where_its_summary_is_none(tmp_path: Path) -> None:
    run = Track.run("p", dir=tmp_path)
    run.summary = None
    with pytest.raises(AttributeError):
        run.finish()
    assert read(run.dir, "status")["status"] == "finished"


def test_a_run_that_is_open_here_cannot_be_resumed_until_it_is_finished(tmp_path: Path) -> None:
    first = Track.run("p", dir=tmp_path / "runs")
    (tmp_path / "link").symlink_to("runs")
    for folder in ("runs", "link"):
        with pytest.raises(TrackingError, match=r"is being written by this process: finish\(\)"):
            Track.run("p", config={"new": 1}, dir=tmp_path / folder, resume=first.id)
    other = f"from dengine.tracking import Track\nTrack.run('p', dir={str(tmp_path / 'runs')!r}, resume={first.id!r})"
    tried = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, timeout=600)
    assert "is being written by another process" in tried.stderr  # the lock has outlived what was refused
    assert read(first.dir, "config") == {}
    first.finish()
    Track.run("p", dir=tmp_path / "runs", resume=first.id).finish()


# -- where nothing is recorded, and where it cannot be -------------------------------------------------------------


def test_disabled_takes_the_same_calls_and_writes_nothing(tmp_path: Path) -> None:
    Track.set_mode("disabled")
    with Track.run("p", config={"lr": 1}, dir=tmp_path / "runs", backend="wandb") as run:
        run.log({"x": 1}, step=3)
        run.log_artifact(Track.Artifact("m", type="model").add_file(tmp_path / "nothing"), aliases=["best"])
        run.summary["best"] = 1
        assert run.config["lr"] == 1
    run.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error_when_the_run_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="cannot be recorded in .*file.*Pass a folder that can be written as dir="):
        Track.run("p", dir=tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"project": "a/b"}, ValueError, "becomes a folder"),
        ({"project": ".."}, ValueError, "becomes a folder"),
        ({"project": 3}, TypeError, "project=3 must be a string"),
        ({"project": "p", "tags": "x"}, TypeError, r"must be a list of words: \['x'\]"),
        ({"project": "p", "backend": "wand"}, ValueError, "no backend 'wand'.*closest: 'wandb'"),
        ({"project": "p", "resume": "../x"}, ValueError, "resume='../x' becomes a folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        Track.run(**arguments, dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="no mode 'off'; there is 'online', 'offline', 'disabled'"):
        Track.set_mode("off")  # type: ignore[arg-type]


def test_a_run_goes_into_runs_of_the_current_folder_wherever_the_process_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Track.run("p", name="first")
    monkeypatch.chdir("/")
    run.log({"x": 1})
    run.finish()
    assert run.dir == tmp_path / "runs" / "p" / run.id
    assert run.name == "first"
    assert len(rows_of(run)) == 1
