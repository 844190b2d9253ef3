"""A rank ends with the torchrun that started it, where that is killed and can tell nobody."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from dengine import Engine, distributed
from dengine.handlers import Preemption
from dengine.launch.parent_death import set_parent_death_signal

AGENT = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(600)
"""
RANK = """
import os, signal, sys, time
from dengine.launch.parent_death import set_parent_death_signal
set_parent_death_signal({} if sys.argv[1] == "other" else {"TORCHELASTIC_RUN_ID": "none"})
def save(*_):
    open(sys.argv[2], "a").write("saved")
    sys.exit()
signal.signal(signal.SIGTERM, save)
open(sys.argv[2], "w").close()
time.sleep(600)
"""


def kill_the_agent(launcher: str, place: Path) -> int:
    """Start a rank below an agent, kill the agent, and give the rank's pid."""
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, "-c", RANK, launcher, str(place)], stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout is not None
    pid = int(agent.stdout.readline())
    while not place.exists():
        assert agent.poll() is None
        time.sleep(0.02)
    agent.kill()
    agent.wait()
    agent.stdout.close()  # not read to its end: the rank has it, too
    return pid


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's kernel")
def test_a_rank_whose_agent_is_killed_is_told_to_leave(tmp_path: Path) -> None:
    pid = kill_the_agent("torchrun", tmp_path / "place")
    end = time.monotonic() + 200
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)
    assert (tmp_path / "place").read_text() == "saved"


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's kernel")
def test_a_process_that_torchrun_did_not_start_outlives_its_parent_as_always(tmp_path: Path) -> None:
    pid = kill_the_agent("other", tmp_path / "place")
    time.sleep(0.5)
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)


def test_it_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    set_parent_death_signal({"TORCHELASTIC_RUN_ID": "none"})


STORE = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


def without_store(rank: int, size: int, host: int, what: str) -> list[int]:
    """Steps that wait for each other; in the fifth the store's host is killed, and then one rank wants to stop."""
    saved: list[int] = []

    def step(engine: Engine, batch: int) -> None:
        dist.all_reduce(torch.ones(1))
        if rank == 0 and batch == 5:
            os.kill(host, signal.SIGKILL)
            while is_running(host):
                time.sleep(0.01)
            if what == "preempted":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "terminated":
                engine.terminate()

    trainer = Engine(step)
    Preemption(lambda engine: saved.append(engine.state.iteration)).attach(trainer)
    with distributed.process_group(timeout=300, stall_timeout=300):
        trainer.run(range(20 if what == "over" else 10**9))
    return saved


@pytest.mark.parametrize("what", ["preempted", "terminated", "over"])
def test_where_the_agent_that_hosts_the_store_is_gone_the_ranks_end_by_an_error_that_says_so(what: str) -> None:
    agent = subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    port = agent.stdout.readline().strip()
    try:
        environment = {"MASTER_PORT": port}
        outcomes = run_ranks(
            *(without_store, 3, agent.pid, what), init=False, env=environment, expect_failures=True, deadline_s=40
        )
    finally:
        agent.kill()
        agent.communicate()
    for outcome in outcomes:
        assert outcome.error_type == "LaunchError", (outcome.error_message, outcome.traceback)
        assert f"The store of the ranks at 127.0.0.1:{port} is gone" in outcome.error_message
        assert "torchrun's agent on that host" in outcome.error_message
        assert outcome.seconds - outcomes[0].seconds < 60
