"""The benchmark of recoveries runs: one job, of which a rank is killed, and which then goes on."""

import json
import re
import sys
from pathlib import Path

from ranks import run_command

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "recovery.py"
PARTS = ("all", "agent", "imports", "group", "build", "load", "step", "lost")


def test_the_parts_of_a_start_and_of_a_recovery_are_measured() -> None:
    options = ("--rounds", "1", "--kills", "1", "--nodes", "1", "--kinds", "dengine", "--no-warm-up")
    done = run_command(sys.executable, str(SCRIPT), *options, deadline_s=120)
    assert done.returncode == 0, done.output
    rows = re.findall(r"^(start|recovery), 1 node, dengine: (.*)$", done.output, re.MULTILINE)
    assert [case for case, _ in rows] == ["start", "recovery"] * 2
    values = json.loads(done.output.splitlines()[-1])["nodes_1"]["median"]
    for case in ("start", "recovery"):
        found = values[case]["dengine"]
        assert tuple(found) == PARTS
        assert found["lost"] == 0
        assert all(found[part] >= 0 for part in PARTS)
        assert found["all"] == sum(found[part] for part in PARTS[1:-1])
