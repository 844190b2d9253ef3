"""The harness itself: what a rank sees, how each kind of failure is told, and that nothing is left running."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import PATIENCE, DeadlineExceeded, RankFailed, run_python, run_ranks, start_server, torchrun

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Share:
    """Of this module only, so it pickles both ways only if a rank knows the module by its name here."""

    numbers: list[float]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# ---- a rank that raises, dies, or hangs ----


def raise_on_rank_1_while_the_rest_wait(rank: int, size: int) -> None:
    print(f"hello from rank {rank}")
    if rank == 1:
        raise ValueError("no such shard")
    time.sleep(600)


def test_a_raising_rank_is_named_with_its_message_traceback_and_output() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(raise_on_rank_1_while_the_rest_wait, 3, grace_s=0.5)
    assert time.monotonic() - start < 250  # the grace, not the deadline
    assert caught.value.rank == 1
    assert caught.value.failures.keys() == {1}
    error_type, message, trace = caught.value.failures[1]
    assert (error_type, message) == ("ValueError", "no such shard")
    assert "raise_on_rank_1_while_the_rest_wait" in trace
    assert str(caught.value).startswith("rank 1 of 3 failed with ValueError: no such shard\n")
    assert "hello from rank 1" in str(caught.value)


def fail_one_after_the_other(rank: int, size: int) -> None:
    time.sleep(0.0 if rank == 1 else 0.5)
    raise ValueError(f"from rank {rank}")


def test_the_first_rank_to_fail_is_the_one_named() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(fail_one_after_the_other, 2, init=False)
    assert caught.value.rank == 1
    assert caught.value.failures.keys() == {0, 1}


def note_pids_and_hang_on_rank_0(rank: int, size: int, folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    folder.joinpath(str(rank)).write_text(f"{os.getpid()} {child.pid}")
    if rank == 0:
        time.sleep(600)


def test_a_hanging_rank_meets_the_deadline_with_its_stack_and_no_process_left(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        run_ranks(note_pids_and_hang_on_rank_0, 2, tmp_path, deadline_s=3.0, init=False)
    assert 3.0 * PATIENCE <= time.monotonic() - start < 250
    assert caught.value.finished == [1]
    assert caught.value.unfinished == [0]
    assert "in note_pids_and_hang_on_rank_0" in caught.value.stacks[0]
    assert "in note_pids_and_hang_on_rank_0" in str(caught.value)
    pids = [int(pid) for rank in "01" for pid in tmp_path.joinpath(rank).read_text().split()]
    assert len(pids) == 4
    assert not [pid for pid in pids if is_alive(pid)]


def wait_for_a_rank_that_never_comes(rank: int, size: int) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # its timeout, 30 min, is longer than the deadline
    if rank == 0:
        dist.barrier()
    time.sleep(600)


def test_the_stack_of_a_rank_blocked_in_native_code_is_shown() -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        run_ranks(wait_for_a_rank_that_never_comes, 2, init=False, deadline_s=3.0)
    assert "in barrier" in caught.value.stacks[0]
    assert "in barrier" not in caught.value.stacks[1]


def test_a_collective_that_blocks_times_out_before_the_deadline_and_names_its_rank() -> None:
    with pytest.raises(RankFailed, match="Timed out") as caught:
        run_ranks(wait_for_a_rank_that_never_comes, 2, deadline_s=3.0, grace_s=0.0)
    assert caught.value.failures.keys() == {0}


def be_killed_or_return_or_raise_or_exit(rank: int, size: int) -> str:
    print("before the end")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        time.sleep(0.5)  # outlives the failures around it: no grace is counted here
    if rank == 2:
        raise ValueError("on purpose")
    if rank == 3:
        sys.exit(75)
    return "alive"


def test_expected_failures_come_back_as_outcomes_of_every_rank() -> None:
    killed, alive, raised, left = run_ranks(be_killed_or_return_or_raise_or_exit, 4, init=False, expect_failures=True)
    assert (killed.rank, killed.exitcode, killed.error_type, killed.value) == (0, -9, "ProcessDied", None)
    assert killed.output == "before the end\n"
    assert (alive.rank, alive.exitcode, alive.error_type, alive.value) == (1, 0, None, "alive")
    assert 0.5 <= alive.seconds < 250
    assert (raised.exitcode, raised.error_type, raised.error_message) == (1, "ValueError", "on purpose")
    assert "on purpose" in raised.traceback
    assert (left.exitcode, left.error_type) == (75, "SystemExit")


def test_a_rank_that_hangs_among_expected_failures_is_told_from_one_that_was_killed() -> None:
    outcomes = run_ranks(wait_for_a_rank_that_never_comes, 2, deadline_s=3.0, expect_failures=True)
    assert [outcome.exitcode for outcome in outcomes] == [1, -9]  # rank 0: the timeout of its group
    assert [outcome.error_type for outcome in outcomes] == ["RuntimeError", "DeadlineExceeded"]


def leave_a_thread_running(rank: int, size: int) -> None:
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise ValueError("with a thread still running")


def test_a_raising_rank_ends_although_one_of_its_threads_does_not() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed):
        run_ranks(leave_a_thread_running, 1)
    assert time.monotonic() - start < 250


def crash_in_native_code(rank: int, size: int) -> None:
    os.abort()


def test_a_crash_in_native_code_shows_where() -> None:
    with pytest.raises(RankFailed, match="in crash_in_native_code") as caught:
        run_ranks(crash_in_native_code, 1)
    assert caught.value.failures[0][:2] == ("ProcessDied", "ended with exit code -6 and no exception")


def test_a_function_that_no_other_process_can_find_is_refused() -> None:
    with pytest.raises(TypeError, match="top level of its module"):
        run_ranks(lambda rank, size: None, 1)


# ---- what a rank sees and gives ----


def environment(rank: int, size: int) -> dict[str, str]:
    return {**os.environ, "threads": str(torch.get_num_threads()), "cwd": os.getcwd()}


def test_a_rank_sees_what_torchrun_would_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SET_BY_THE_TEST", "yes")  # long after the server started
    monkeypatch.chdir(tmp_path)
    seen = run_ranks(environment, 2, env={"GROUP_RANK": "7"})
    for rank in range(2):
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "7",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "SET_BY_THE_TEST": "yes",
            "threads": "1",
            "cwd": str(tmp_path),
        }
        assert {name: seen[rank][name] for name in expected} == expected
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"]


def sum_over_ranks(rank: int, size: int, share_of: list[Share], does_init: bool) -> torch.Tensor:
    if does_init:
        dist.init_process_group("gloo")  # env://, as in a program of a user
    total = torch.tensor(share_of[rank].numbers).sum()
    dist.all_reduce(total)
    return total


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("shares", [[[1.0, 2.0]], [[], [3.0, 4.0]], [[1.0], [2.0, 5.0], []]])
def test_the_sum_over_ranks_is_the_sum_over_all_numbers(shares: list[list[float]], init: bool) -> None:
    oracle = torch.tensor(sum(shares, [])).sum()
    results = run_ranks(sum_over_ranks, len(shares), [Share(numbers) for numbers in shares], not init, init=init)
    assert results == [oracle] * len(shares)


def own_share(rank: int, size: int) -> Share:
    return Share([float(rank)])


def test_a_class_of_the_test_module_comes_back_as_itself_from_each_of_two_calls() -> None:
    assert run_ranks(own_share, 2) == [Share([0.0]), Share([1.0])]
    server = start_server()
    assert run_ranks(own_share, 2) == [Share([0.0]), Share([1.0])]
    assert start_server() is server  # no second one, which would load torch anew


def many_bytes(rank: int, size: int, megabytes: int) -> torch.Tensor:
    return torch.full((megabytes * 2**20,), rank, dtype=torch.uint8)


def test_a_large_result_comes_back_whole() -> None:
    results = run_ranks(many_bytes, 2, 50, init=False)
    assert [result.numel() for result in results] == [50 * 2**20] * 2
    assert [(int(result.min()), int(result.max())) for result in results] == [(0, 0), (1, 1)]


# ---- scripts ----

SCRIPT = """
import os, subprocess, sys, time
import torch, torch.distributed as dist
import ranks                                     # importable, as dengine is
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
sys.stdout.write(f"total={total.item()} pid={child.pid}\\n")
sys.stdout.flush()
if sys.argv[1] == "hang":
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""


def pids_printed(output: str) -> list[int]:
    return [int(pid) for pid in re.findall(r"pid=(\d+)", output)]


def test_torchrun_runs_a_script_on_real_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = torchrun(script, 2, "0")
    assert done.returncode == 0, done.output
    assert done.output.count("total=3 ") == 2
    pids = pids_printed(done.output)
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


def test_torchrun_at_its_deadline_shows_the_stacks_and_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with pytest.raises(DeadlineExceeded) as caught:
        torchrun(script, 2, "hang", deadline_s=8.0)
    message = str(caught.value)
    assert f'File "{script}", line 12 in <module>' in message, message
    pids = pids_printed(message)
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


def test_run_python_gives_code_and_output(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1]); sys.exit('and stderr')")
    done = run_python(script, "stdout")
    assert done.returncode == 1
    assert sorted(done.output.splitlines()) == ["and stderr", "stdout"]


# ---- under another pytest: a folder below, and the check for leftovers ----

INNER = """
import subprocess, sys
from dataclasses import dataclass
from ranks import run_ranks

@dataclass
class Mine:
    rank: int

def mine(rank, size):
    return Mine(rank)

def test_passes():
    assert run_ranks(mine, 2) == [Mine(0), Mine(1)]

def test_leaks():
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(f"pid={child.pid} ")
"""


@pytest.mark.parametrize("options", [[], ["-s"], ["-n", "2"]])
def test_in_a_subfolder_of_another_pytest_ranks_work_and_a_leak_is_an_error(tmp_path: Path, options: list[str]) -> None:
    folder = tmp_path / "tests_dist" / "below"
    folder.mkdir(parents=True)
    shutil.copytree(HERE / "support", folder.parent / "support")
    shutil.copy(HERE / "conftest.py", folder.parent)
    folder.joinpath("test_inner.py").write_text(INNER)
    done = run_python(
        "-m",
        "pytest",
        "--import-mode=importlib",
        "--rootdir",
        str(tmp_path),
        f"--basetemp={tmp_path / 'inner'}",  # of its own: another pytest of this machine would clear up the common one
        "-rA",
        "-p",
        "no:cacheprovider",
        *options,
        str(folder),
    )
    assert done.returncode == 1, done.output
    assert "2 passed, 1 error" in done.output
    assert "the test left 1 processes running: {" in done.output
    assert "sleep 600" in done.output
    pids = pids_printed(done.output)
    assert pids
    assert not [pid for pid in pids if is_alive(pid)]
