"""The main job under the real torchrun: it trains, counts the same on any number of ranks, and ends on Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
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


def test_ctrl_c_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(DIGITS)]
    options = ["--epochs", "1000", "--patience", "1000", "--output", str(tmp_path / "run")]
    with log.open("wb") as file:
        launched = subprocess.Popen(
            [*command, *options], stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + 120.0
        while "epoch 2 " not in log.read_text() and launched.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        launched.send_signal(signal.SIGINT)
        launched.wait(25.0)  # torchrun itself kills workers after 30 s: before it the ranks have ended by themselves
    finally:
        if launched.poll() is None:
            launched.terminate()
            launched.wait(60.0)
    printed = log.read_text()
    assert "epoch 2 " in printed
    assert printed.count("Interrupted.") == 1
    assert 'digits.py", line' not in printed, printed  # torchrun has a traceback of its own; the ranks have none
