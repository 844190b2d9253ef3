"""`--fast-dir` of the scripts in slurm/: the folders in memory stay while the job is requeued, and only so long."""

import os
import re
from pathlib import Path

import pytest
from slurm_cluster import JOB, Cluster, on, until


def folders(memory: Path, number: str) -> list[str]:
    return sorted(path.name.removeprefix(f"dengine-{os.getuid()}-{number}-") for path in memory.iterdir())


def test_it_stays_while_a_job_is_requeued_and_is_removed_when_it_is_done(cluster: Cluster, tmp_path: Path) -> None:
    memory, safe = tmp_path / "memory", tmp_path / "safe"
    memory.mkdir()
    job = cluster.submit("train", f"--fast-dir={memory}", JOB, str(safe), "--pause=0.2", options=on(1, 2))
    job.reaches(safe, 7)
    assert folders(memory, job.number) == ["node1", "node2"]
    job.signal_shell()
    job.says("requeued after SIGUSR1")
    assert folders(memory, job.number) == ["node1", "node2"]
    assert job.wait(300) == "COMPLETED 0:0", job.log
    assert folders(memory, job.number) == []
    assert job.log.count("with mode 700") == 4
    assert len(re.findall(r"rank \d resumes from /\S+/(memory|safe)/", job.log)) == 2, job.log


@pytest.mark.parametrize("form", ["train", "torchrun"])
def test_it_is_removed_when_a_job_fails_or_is_cancelled(cluster: Cluster, tmp_path: Path, form: str) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    start = (f"--fast-dir={memory}", JOB, str(tmp_path / "safe"), "--pause=0.2")
    job = cluster.submit(form, *start, "--fail-at=8", options=on(1, 2))
    assert job.wait().startswith("FAILED "), job.log
    assert "with mode 700" in job.log
    assert folders(memory, job.number) == []
    job = cluster.submit(form, *start, options=on(1, 2))
    job.reaches(tmp_path / "safe", 9)
    assert folders(memory, job.number) == ["node1", "node2"]
    cluster.client("scancel", job.number)
    until(lambda: job.fields["JobState"] == "CANCELLED", 60, lambda: job.fields)
    until(lambda: folders(memory, job.number) == [], 60, lambda: folders(memory, job.number))
