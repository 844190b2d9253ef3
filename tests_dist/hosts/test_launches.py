"""Training over hosts with addresses of their own: it works, and what happens where a cable or an agent goes."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from net_hosts import Command, Hosts, until
from ranks import torchrun

JOB = str(Path(__file__).parents[1] / "support" / "small_job.py")


def everywhere(hosts: Hosts, script: str, *arguments: str, **environment: str) -> tuple[Command, Command]:
    """The same line on both hosts, on the second one first: the order must not matter."""
    second = hosts.launch("h2", script, JOB, *arguments, env=environment)
    return hosts.launch("h1", script, JOB, *arguments, env=environment), second


def digests(text: str) -> set[str]:
    return set(re.findall(r"has (\w+) after", text))


def reach(folder: Path, iteration: int, *commands: Command) -> None:
    place = folder / "iteration"
    until(
        lambda: place.exists() and int(place.read_text()) >= iteration,
        150,
        lambda: "\n".join(command.log for command in commands),
    )


@pytest.fixture(scope="module")
def on_one_host(tag: str, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The bits at the end of two ranks on this machine."""
    here = torchrun(JOB, 2, str(tmp_path_factory.mktemp("one")))
    assert here.returncode == 0, here.output
    return digests(here.output)


@pytest.mark.parametrize("is_debian", [False, True])
def test_two_hosts_train_to_the_bits_of_two_ranks_on_one(
    hosts: Hosts, tmp_path: Path, on_one_host: set[str], is_debian: bool
) -> None:
    """Debian gives a host's own name 127.0.1.1: torchrun then finds no host for the meeting, and Gloo no way out."""
    if is_debian:
        hosts.name_as_debian_does()
    first, second = everywhere(hosts, "multinode.sh", str(tmp_path / "two"), NNODES="2", HEAD="h1")
    assert (first.wait(), second.wait()) == (0, 0), first.log + second.log
    assert "of 2 on h1" in first.log
    assert "of 2 on h2" in second.log
    assert digests(first.log + second.log) == on_one_host


def test_hosts_that_gloo_cannot_connect_are_named_at_once(hosts: Hosts, tmp_path: Path) -> None:
    """h1 has two networks, and neither its name nor a route tells by which of them the other one comes."""
    hosts.name_as_debian_does()
    for words in ("link add eth1 type veth peer name eth2", "addr add 10.78.0.1/24 dev eth1", "link set eth1 up"):
        added = hosts.control("exec", "h1", "ip", *words.split())
        assert added.returncode == 0, added.stdout
    environment = {"NNODES": "2", "HEAD": "h1"}
    first, second = everywhere(hosts, "multinode.sh", str(tmp_path / "job"), **environment)
    assert (first.wait(), second.wait()) == (1, 1)
    for command in (first, second):
        assert "LaunchError: Gloo would not connect the hosts, since on h1 (rank 0) the host's own name" in command.log
    environment["GLOO_SOCKET_IFNAME"] = "eth0"
    first, second = everywhere(hosts, "multinode.sh", str(tmp_path / "job"), **environment)
    assert (first.wait(), second.wait()) == (0, 0), first.log + second.log


def test_where_a_cable_is_cut_the_silent_rank_is_named_and_nobody_trains_on(hosts: Hosts, tmp_path: Path) -> None:
    """Without dengine the kernel says so after 15 minutes, and the agent of the host that is cut off stays as long."""
    arguments = (str(tmp_path / "job"), "--pause=0.2", "--iterations=1000", "--stall-timeout=20")
    first, second = everywhere(hosts, "multinode.sh", *arguments, NNODES="2", HEAD="h1")
    reach(tmp_path / "job", 10, first, second)
    assert len(hosts.ranks("h2", JOB)) == 1
    hosts.control("cut", "h2")
    seconds = first.says("StallError")
    print(f"named {seconds:.1f} s after the cut")
    assert "StallError: Rank 1 has made no progress for 20 s" in first.log
    assert "its process is stopped or holds the interpreter, or its host is not reached" in first.log
    assert first.wait() == 1
    # From where it is, it cannot say to anybody that it ends: the store is on the other side.
    waited = until(lambda: not hosts.ranks("h2", JOB), 150, lambda: second.log)
    print(f"no rank is left on the host that is cut off {waited:.1f} s after the first one ended")
    assert "its process is stopped or hangs, or its host is not reached" in second.log


def test_ranks_whose_agent_is_killed_save_and_leave_with_all_others(hosts: Hosts, tmp_path: Path) -> None:
    arguments = (str(tmp_path / "job"), "--pause=0.2", "--iterations=1000")
    first, second = everywhere(hosts, "multinode.sh", *arguments, NNODES="2", HEAD="h1")
    reach(tmp_path / "job", 10, first, second)
    # Not the host of rank 0, by whose agent the ranks speak to each other: without that one, all end by an error.
    assert "rank 1 of 2 on h2" in second.log
    os.kill(second.process.pid, signal.SIGKILL)
    until(lambda: not hosts.ranks("h2", JOB), 150, lambda: second.log)
    assert first.wait() == 1, first.log
    assert "rank 0 saved after" in first.log + second.log
    assert "rank 1 saved after" in first.log + second.log


def test_a_rank_that_is_killed_is_begun_again_with_all_others_and_the_end_is_the_same(
    hosts: Hosts, tmp_path: Path, on_one_host: set[str]
) -> None:
    """By the same two agents, whose store still has the addresses of the ranks before."""
    arguments = (str(tmp_path / "job"), "--pause=0.2")
    first, second = everywhere(hosts, "elastic.sh", *arguments, NNODES="2:2", HEAD="h1", LAST_CALL="3")
    reach(tmp_path / "job", 12, first, second)
    (rank,) = hosts.ranks("h2", JOB)
    os.kill(rank, signal.SIGKILL)
    assert (first.wait(), second.wait()) == (0, 0), first.log + second.log
    assert len(re.findall("of 2 on h1 begins after", first.log)) == 2
    assert digests(first.log + second.log) == on_one_host


def test_ranks_go_on_from_the_memory_of_the_host_that_still_has_it(
    hosts: Hosts, tmp_path: Path, on_one_host: set[str]
) -> None:
    """A rank is killed, and one host has lost what its memory held."""
    environment = {"NNODES": "2:2", "HEAD": "h1", "LAST_CALL": "3"}
    memory = {host: tmp_path / host / f"dengine-{os.getuid()}-dengine" for host in ("h2", "h1")}
    commands = {}
    for host, folder in memory.items():
        folder.parent.mkdir()
        start = (f"--fast-dir={folder.parent}", JOB, str(tmp_path / "job"), "--pause=0.2")
        commands[host] = hosts.launch(host, "elastic.sh", *start, env=environment)
    first, second = commands["h1"], commands["h2"]
    reach(tmp_path / "job", 14, first, second)
    (rank,) = hosts.ranks("h2", JOB)
    at = int((tmp_path / "job" / "iteration").read_text())
    os.kill(rank, signal.SIGKILL)
    until(lambda: not hosts.ranks("h1", JOB) and not hosts.ranks("h2", JOB), 60, lambda: first.log + second.log)
    shutil.rmtree(memory["h1"])
    assert (first.wait(), second.wait()) == (0, 0), first.log + second.log
    paths = re.findall(r"resumes from (/\S+)/checkpoint_(\d+)", first.log + second.log)
    assert {path for path, _ in paths} == {str(folder) for folder in memory.values()}
    assert all(int(step) >= at - 4 for _, step in paths)
    assert digests(first.log + second.log) == on_one_host
    assert not any(folder.exists() for folder in memory.values())


def test_a_host_whose_cable_is_healed_joins_again_and_training_goes_on_meanwhile(hosts: Hosts, tmp_path: Path) -> None:
    arguments = (str(tmp_path / "job"), "--pause=0.2", "--iterations=100000", "--stall-timeout=20")
    environment = {"NNODES": "1:2", "HEAD": "h1", "LAST_CALL": "15"}
    first, second = everywhere(hosts, "elastic.sh", *arguments, **environment)
    reach(tmp_path / "job", 11, first, second)  # what is saved in the tenth is safe only after it is over
    hosts.control("cut", "h2")
    print(f"alone {first.says('of 1 on h1 begins after'):.1f} s after the cut")
    alone = int(re.findall(r"of 1 on h1 begins after (\d+)", first.log)[0])
    assert alone >= 10
    hosts.control("heal", "h2")
    together = r"of 2 on h1 begins after (\d+)"
    seconds = until(lambda: len(re.findall(together, first.log)) == 2, 240, lambda: first.log + second.log)
    print(f"together {seconds:.1f} s after the heal")
    assert int(re.findall(together, first.log)[1]) >= alone
    for command in (first, second):
        command.process.send_signal(signal.SIGUSR1)
    assert (first.wait(), second.wait()) == (1, 1)


@pytest.mark.parametrize("lost", ["h2", "h1"])  # h1 has rank 0, wherever the meeting is
def test_the_first_attempt_with_a_host_that_joins_again_trains(hosts: Hosts, tmp_path: Path, lost: str) -> None:
    """torchrun's agents keep what they know of the last meeting, its store what the ranks before have said."""
    arguments = (str(tmp_path / "job"), "--pause=0.1", "--iterations=100000")
    kept = "h1" if lost == "h2" else "h2"
    environment = {"NNODES": "1:2", "HEAD": kept, "LAST_CALL": "15"}
    first, second = everywhere(hosts, "elastic.sh", *arguments, **environment)
    stays, comes = (first, second) if kept == "h1" else (second, first)
    reach(tmp_path / "job", 5, first, second)
    os.kill(hosts.agent(lost), signal.SIGKILL)
    begun = r"of (\d) on h\d begins after (\d+)"
    until(lambda: len(re.findall(begun, comes.log)) == 2, 100, lambda: first.log + second.log)
    until(lambda: re.findall(begun, stays.log)[-1][0] == "2", 100, lambda: first.log + second.log)
    together = int(re.findall(begun, stays.log)[-1][1])
    reach(tmp_path / "job", together + 10, first, second)
    for command in (first, second):
        command.process.send_signal(signal.SIGUSR1)
    assert (first.wait(), second.wait()) == (1, 1)
    assert [size for size, _ in re.findall(begun, comes.log)] == ["2", "2"], comes.log
    assert [size for size, _ in re.findall(begun, stays.log)] in (["2", "1", "2"], ["2", "2"]), stays.log
