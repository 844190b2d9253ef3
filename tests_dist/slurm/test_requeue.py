"""Jobs that are told to leave, or lose a node: SLURM begins them again, and they end with the bits of one that ran on.

Each job is a real one, on nodes of its own, submitted by the script of slurm/ that users submit.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import JOB, Cluster, Job, on, until


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


def lose_a_node(cluster: Cluster, job: Job) -> None:
    """Its power fails; SLURM notices, and begins the job again by itself, with another node."""
    assert cluster.control("crash", "node4").returncode == 0
    until(lambda: job.fields["Restarts"] == "1", 60, lambda: job.fields)


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
        ("train", lose_a_node, 75, None),
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
    said: str | None,
) -> None:
    nodes = on(3, 4) if disturb is not lose_a_node else ("--nodes=2", "--ntasks-per-node=1", "--exclude=node[1-2]")
    job = cluster.submit(form, JOB, str(tmp_path), "--pause=0.2", f"--exit-code={code}", options=nodes)
    job.reaches(tmp_path, 12)
    disturb(cluster, job)
    assert job.wait() == "COMPLETED 0:0", job.log
    if disturb is lose_a_node:
        assert "on node[3,5]" in job.log
        assert cluster.control("boot", "node4").returncode == 0
    assert job.fields["Restarts"] == "1"
    first, second = begun_after(job)
    assert (first, second >= 10) == (0, True)
    assert digests(job) == uninterrupted
    assert said is None or said in job.log
    # A lost node takes its ranks along; whoever is told saves where it is.
    assert (disturb is lose_a_node) == ("rank 1 saved" not in job.log)


def test_a_job_is_warned_of_its_time_limit_and_goes_on_in_the_next(out_of_time: Job, uninterrupted: set[str]) -> None:
    assert out_of_time.wait(200) == "COMPLETED 0:0", out_of_time.log
    assert "requeued after SIGUSR1" in out_of_time.log
    assert len(begun_after(out_of_time)) >= 2
    assert digests(out_of_time) == uninterrupted
