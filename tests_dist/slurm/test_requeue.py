"""Jobs that are told to leave, or lose a node: SLURM begins them again, and they end with the bits of one that ran on.

Each job is a real one, on nodes of its own, submitted by the script of slurm/ that users submit.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from slurm_cluster import JOB, Cluster, Job, on

DIGITS = "examples/digits.py"


def digests(job: Job) -> set[str]:
    return set(re.findall(r"has (\w+) after", job.log))


def begun_after(job: Job) -> list[int]:
    """From which iteration rank 0 went on, each time that the job was begun."""
    return [int(number) for number in re.findall(r"rank 0 of 2 on \w+ begins after (\d+)", job.log)]


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The bits at the end of a job that nobody disturbs."""
    job = cluster.submit("train", JOB, str(tmp_path_factory.mktemp("uninterrupted")), options=on(3, 4))
    assert job.wait() == "COMPLETED 0:0", job.log
    found = digests(job)
    assert len(found) == 1
    return found


def tell_the_shell(cluster: Cluster, job: Job) -> None:
    """What the warning before the time limit does, without waiting for it."""
    job.signal_shell()


def make_room_for_an_urgent_job(cluster: Cluster, job: Job) -> None:
    """SLURM tells the ranks alone, by SIGTERM, and would take a job that then ends for one that is done."""
    urgent = ("--partition=urgent", "--exclusive", *on(3, 4))
    cluster.client("sbatch", *urgent, "--output=/dev/null", "--wrap=sleep 1")


@pytest.mark.parametrize(
    ("form", "disturb", "code", "said"),
    [
        ("torchrun", tell_the_shell, 0, "requeued after SIGUSR1 (exit code 0)"),
        ("train", make_room_for_an_urgent_job, 0, "requeued after preemption (exit code 0)"),
        ("torchrun", make_room_for_an_urgent_job, 75, "requeued after preemption (exit code 1"),
    ],
)
def test_a_job_that_is_begun_again_ends_with_the_bits_of_one_that_ran_on(
    cluster: Cluster,
    uninterrupted: set[str],
    tmp_path: Path,
    form: str,
    disturb: Callable[[Cluster, Job], None],
    code: int,
    said: str,
) -> None:
    job = cluster.submit(form, JOB, str(tmp_path), "--pause=0.2", f"--exit-code={code}", options=on(3, 4))
    job.reaches(tmp_path, 12)
    disturb(cluster, job)
    assert job.wait() == "COMPLETED 0:0", job.log
    assert job.fields["Restarts"] == "1"
    first, second = begun_after(job)
    assert (first, second >= 10) == (0, True)
    assert digests(job) == uninterrupted
    assert said in job.log
    assert "rank 1 saved" in job.log  # whoever is told saves where it is


def test_a_job_is_warned_of_its_time_limit_and_goes_on_in_the_next(out_of_time: Job, uninterrupted: set[str]) -> None:
    assert out_of_time.wait(200) == "COMPLETED 0:0", out_of_time.log
    assert "requeued after SIGUSR1" in out_of_time.log
    assert len(begun_after(out_of_time)) >= 2
    assert digests(out_of_time) == uninterrupted


# -- the main job, as a new user submits it ----------------------------------------------------------------------


def digits(cluster: Cluster, folder: Path, *options: str) -> Job:
    return cluster.submit("train", DIGITS, "--epochs", "4", "--output", str(folder), options=options)


def weights(job: Job) -> str:
    """The SHA-256 of what the job gives as its checkpoint."""
    (path,) = re.findall("^Checkpoint: (.*)$", job.log, re.MULTILINE)
    model = torch.load(path, weights_only=True)["model"]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.values())).hexdigest()


def rows(folder: Path) -> list[dict[str, object]]:
    """What the one run in `folder` has recorded, but for what a clock has its part in."""
    (path,) = folder.glob("digits/*/metrics.jsonl")
    recorded = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("time", "samples_per_s")} for row in recorded]


def test_the_main_job_loses_a_node_or_is_told_to_leave_and_gives_the_same_model(
    cluster: Cluster, tmp_path: Path
) -> None:
    """All three at once: each on nodes of its own, but for the one that loses one."""
    whole = digits(cluster, tmp_path / "whole", *on(1, 2))
    told = digits(cluster, tmp_path / "told", *on(1, 2))
    lost = digits(cluster, tmp_path / "lost", "--nodes=2", "--ntasks-per-node=1", "--exclude=node[1-2]")
    told.says("epoch 1 ")
    told.signal_shell()
    lost.says("epoch 1 ")
    assert cluster.control("crash", "node4").returncode == 0  # its power fails
    for job, restarts in ((whole, "0"), (told, "1"), (lost, "1")):
        assert job.wait(240) == "COMPLETED 0:0", job.log
        assert job.fields["Restarts"] == restarts
        assert job.log.count("Going on after iteration") == int(restarts), job.log
    assert cluster.control("boot", "node4").returncode == 0
    assert "requeued after SIGUSR1" in told.log
    assert "on node[3,5]" in lost.log  # SLURM itself noticed, and took another node
    assert weights(whole) == weights(told) == weights(lost)
    assert rows(tmp_path / "told") == rows(tmp_path / "whole")
    # An epoch of which the row was written, but that was not saved, comes twice.
    once = {json.dumps(row): row for row in rows(tmp_path / "lost")}
    assert list(once.values()) == rows(tmp_path / "whole")
