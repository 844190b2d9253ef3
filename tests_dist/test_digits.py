"""The main job under the real torchrun: it trains, goes on, counts the same on any number of ranks, ends on Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from ranks import run_python, torchrun

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits.py"


@pytest.fixture(scope="module")
def printed_by_two_ranks(tag: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("digits")
    done = torchrun(DIGITS, 2, "--epochs", "2", "--output", str(folder), deadline_s=240.0)
    assert done.returncode == 0, done.output
    return done.output


def found(pattern: str, printed: str) -> str:
    """The one place that fits: what rank 0 alone prints stands there once."""
    places = re.findall(pattern, printed, re.MULTILINE)
    assert len(places) == 1, printed
    return str(places[0])


def accuracy_in(printed: str) -> str:
    return found(r"^Validation accuracy: (.*)$", printed)


def test_two_ranks_train_and_say_where_everything_is(printed_by_two_ranks: str) -> None:
    assert float(accuracy_in(printed_by_two_ranks).split(" = ")[1]) > 0.9
    assert Path(found("^Checkpoint: +(.*)$", printed_by_two_ranks)).is_file()
    assert Path(found("^Curves: +(.*)$", printed_by_two_ranks)).is_file()
    assert "Traceback" not in printed_by_two_ranks


def test_one_and_three_ranks_find_the_same_accuracy_for_the_same_weights(printed_by_two_ranks: str) -> None:
    weights = found("^Checkpoint: +(.*)$", printed_by_two_ranks)
    one = run_python(DIGITS, "--evaluate-only", weights)
    three = torchrun(DIGITS, 3, "--evaluate-only", weights)
    assert re.fullmatch(r"\d+/359 = 0\.\d+", accuracy_in(one.output))
    assert accuracy_in(one.output) == accuracy_in(three.output) == accuracy_in(printed_by_two_ranks)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the job on two ranks and go on; what it prints is in the file `log`, and its runs are in `run`."""
    processes = []

    def launch(torchrun_options: Sequence[str], *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        with (tmp_path / "log").open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [*command, *torchrun_options, str(DIGITS), *options, "--output", str(tmp_path / "run")],
                    stdout=file,
                    stderr=file,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
        return processes[-1]

    yield launch
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.wait(60.0)


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600.0
    while text not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert text in log.read_text()


def test_where_a_rank_is_killed_torchrun_begins_all_again_and_the_end_is_the_same(
    printed_by_two_ranks: str, launched: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = launched(["--max-restarts=1"], "--epochs", "2")
    wait_for("epoch 1 ", tmp_path / "log", process)
    (status,) = tmp_path.glob("run/digits/*/status.json")
    os.kill(json.loads(status.read_text())["pid"], signal.SIGKILL)
    assert process.wait(600.0) == 0, (tmp_path / "log").read_text()
    printed = (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("run/digits/*"))) == 1
    assert accuracy_in(printed) == accuracy_in(printed_by_two_ranks)
    weights, same = (
        torch.load(found("^Checkpoint: +(.*)$", text), weights_only=True)["model"]
        for text in (printed, printed_by_two_ranks)
    )
    assert all(torch.equal(weights[name], same[name]) for name in same)


def test_ctrl_c_ends_all_ranks_with_one_line(launched: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    process = launched([], "--epochs", "1000", "--patience", "1000")
    wait_for("epoch 2 ", tmp_path / "log", process)
    process.send_signal(signal.SIGINT)
    process.wait(25.0)  # torchrun itself kills workers after 30 s: before it the ranks have ended by themselves
    printed = (tmp_path / "log").read_text()
    assert printed.count("Interrupted.") == 1
    assert 'digits.py", line' not in printed, printed  # torchrun has a traceback of its own; the ranks have none
