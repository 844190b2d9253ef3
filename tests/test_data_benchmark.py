"""The benchmark of loaders runs, with so few samples that it takes no time."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "data.py"


def test_each_loader_is_measured_with_and_without_workers_and_at_each_position() -> None:
    command = [sys.executable, str(SCRIPT), "--samples", "400", "--rounds", "1", "--workers", "0", "1"]
    done = subprocess.run([*command, "--positions", "10", "1000000000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for values in found["throughput"].values():
        kinds = {f"{data}, {kind}" for data in ("tensors", "work", "stream") for kind in ("plain", "prepared")}
        assert kinds <= set(values)
        assert all(each["samples_per_s"] > 0 for each in values.values())
    for position in ("10", "1000000000"):
        assert found["first_batch_ms"][position]["prepared"] > 0
        assert found["first_batch_ms"][position]["packed"] > 0
    assert found["first_batch_ms"]["1000000000"]["plain, drawn and dropped"] is None
