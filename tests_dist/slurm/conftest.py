"""One SLURM cluster for all tests of this folder, where there is what it needs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import find_processes
from slurm_cluster import JOB, Cluster, Job, on

CANNOT = 77


@pytest.fixture
def no_process_left_over() -> None:
    """Instead of the one for each test: jobs and daemons outlive a test here. The cluster's end takes all of them."""


@pytest.fixture(scope="session")
def cluster(tag: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Five nodes, so that a job can wait for its time limit while other tests run, and another can lose a node."""
    # Not in pytest's own folder: the path of a socket is limited to about 100 letters.
    folder = Path(f"/tmp/dengine-slurm-{os.getpid()}")
    found = Cluster(folder, tmp_path_factory.mktemp("slurm"))
    before = find_processes(tag=found.tag).keys()
    begun = found.control("up", "--nodes", "5", "--cpus", "8", "--owner", str(os.getpid()))
    if begun.returncode == CANNOT and "DENGINE_REQUIRE_SLURM" not in os.environ:
        pytest.skip(begun.stdout.strip())
    try:
        assert begun.returncode == 0, begun.stdout
        yield found
    finally:
        ended = found.control("down")
    assert ended.returncode == 0, ended.stdout
    assert find_processes(tag=found.tag).keys() - before == set()


@pytest.fixture(scope="session")
def out_of_time(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job whose training takes longer than its time limit. SLURM is in no hurry: other tests run meanwhile."""
    arguments = (str(tmp_path_factory.mktemp("out_of_time")), "--pause=2.5")
    return cluster.submit("train", JOB, *arguments, options=(*on(1, 2), "--time=2", "--signal=B:USR1@60"))


@pytest.fixture(scope="session", autouse=True)
def begun_in_time(out_of_time: Job) -> None:
    """Begin it before the first test."""
