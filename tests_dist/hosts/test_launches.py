"""Training over hosts with addresses of their own: it works, and what happens where a cable or an agent goes."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from net_hosts import Command, Hosts, until
from ranks import torchrun

JOB = str(Path(__file__).parents[1] / "small_job.py")


def everywhere(hosts: Hosts, script: str, *arguments: str, **environment: str) -> tuple[Command, Command]:
    """The same line on both hosts, on the second one first: the order must not matter."""
    second = hosts.launch("h2", script, JOB, *arguments, env=environment)
    return hosts.launch("h1", script, JOB, *arguments, env=environment), second


def digests(*commands: Command) -> set[str]:
    return {digest for command in commands for digest in re.findall(r"has (\w+) after", command.log)}


def reach(folder: Path, iteration: int, *commands: Command) -> None:
    place = folder / "iteration"
    until(
        lambda: place.exists() and int(place.read_text()) >= iteration,
        120,
        lambda: "\n".join(command.log for command in commands),
    )


@pytest.mark.parametrize("is_debian", [False, True])
def test_two_hosts_train_to_the_bits_of_two_ranks_on_one(hosts: Hosts, tmp_path: Path, is_debian: bool) -> None:
    if is_debian:
        hosts.name_as_debian_does()
    first, second = everywhere(hosts, "multinode.sh", str(tmp_path / "two"), NNODES="2", HEAD="h1")
    assert (first.wait(), second.wait()) == (0, 0), first.log + second.log
    assert "of 2 on h1" in first.log
    assert "of 2 on h2" in second.log
    here = torchrun(JOB, str(tmp_path / "one"), nproc=2)
    assert here.returncode == 0, here.output
    assert digests(first, second) == set(re.findall(r"has (\w+) after", here.output))


def test_a_cut_cable_is_noticed_after_the_stall_timeout_and_who_is_silent_is_named(
    hosts: Hosts, tmp_path: Path
) -> None:
    arguments = (str(tmp_path / "job"), "--pause=0.2", "--iterations=1000", "--stall-timeout=8")
    first, second = everywhere(hosts, "multinode.sh", *arguments, NNODES="2", HEAD="h1")
    reach(tmp_path / "job", 10, first, second)
    hosts.control("cut", "h2")
    cut = time.monotonic()
    assert first.wait() == 1, first.log
    print(f"the rank of h1 ended {time.monotonic() - cut:.1f} s after the cut\n{first.log}")
    first.says("StallError")
    until(lambda: not hosts.processes("h2", "small_job.py --"), 60, lambda: second.log)
    print(f"the rank of h2 ended {time.monotonic() - cut:.1f} s after the cut\n{second.log}")


def test_ranks_whose_agent_is_killed_save_and_leave_with_all_others(hosts: Hosts, tmp_path: Path) -> None:
    arguments = (str(tmp_path / "job"), "--pause=0.2", "--iterations=1000")
    first, second = everywhere(hosts, "multinode.sh", *arguments, NNODES="2", HEAD="h1")
    reach(tmp_path / "job", 10, first, second)
    os.kill(second.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    assert first.wait() == 1, first.log
    print(f"h1 ended {time.monotonic() - killed:.1f} s after the kill")
    until(lambda: not hosts.processes("h2", "small_job.py"), 20, lambda: second.log)
    assert "saved after" in first.log
    assert "saved after" in second.log


def test_a_host_whose_cable_is_healed_joins_again_and_training_goes_on_meanwhile(hosts: Hosts, tmp_path: Path) -> None:
    arguments = (str(tmp_path / "job"), "--pause=0.3", "--iterations=1000", "--stall-timeout=8")
    environment = {"NNODES": "1:2", "HEAD": "h1", "LAST_CALL": "3"}
    first, second = everywhere(hosts, "elastic.sh", *arguments, **environment)
    reach(tmp_path / "job", 10, first, second)
    hosts.control("cut", "h2")
    cut = time.monotonic()
    first.says("rank 0 of 1 on h1 begins after")
    print(f"h1 trains alone {time.monotonic() - cut:.1f} s after the cut")
    hosts.control("heal", "h2")
    healed = time.monotonic()
    until(lambda: first.log.count("of 2 on h1 begins after") == 2, 120, lambda: first.log + second.log)
    print(f"both train again {time.monotonic() - healed:.1f} s after the heal\n{first.log}\n---------\n{second.log}")
