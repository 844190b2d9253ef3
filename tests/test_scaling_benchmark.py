"""The benchmark of what grows with the number of ranks runs, at so few that it takes no time."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_case_is_measured_for_each_number_of_ranks(tmp_path: Path) -> None:
    picture = tmp_path / "scaling.svg"
    command = [sys.executable, str(SCRIPT), "--ranks", "4", "16", "--samples", "10000", "--most-threaded", "8"]
    if find_spec("matplotlib") is not None:
        command += ["--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+), (\d+) ranks: (.*)$", done.stdout, re.MULTILINE)
    assert [(case, int(num_ranks)) for case, num_ranks, _ in rows] == [
        (case, num_ranks) for case in ("sampler", "metrics", "checkpoint", "store") for num_ranks in (4, 16)
    ]
    of_the_store = [values for case, _, values in rows if case == "store"]
    for step in ("meet", "open", "stop", "leave", "fail", "abort"):
        assert all(f"{step}, s " in values for values in of_the_store), step
    for _, _, values in rows:
        assert all(float(each.rpartition(" ")[2]) >= 0 for each in values.split("; "))
    assert picture.exists() == ("--plot" in command)
