"""The doctor on real ranks: each fault is planted on some of them, and must be found, placed, and come with advice."""

import ctypes
import io
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from ranks import free_port, run_command, run_ranks, torchrun

from dengine import distributed
from dengine.__main__ import main
from dengine.tools.doctor import devices, group

Visit = tuple[int, str, str]  # exit code, stdout, stderr
WAIT_S = "4"


def doctor(rank: int, size: int, folder: str, *options: str, plant: Callable[..., Any] | None = None) -> Visit:
    if plant is not None:
        plant(rank, size, folder)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["doctor", "--json", "--wait", WAIT_S, "--folder", folder, *options])
    return code, out.getvalue(), err.getvalue()


def checks(visit: Visit) -> dict[str, dict[str, Any]]:
    return {each["check"]: each for each in json.loads(visit[1])["checks"]}


def found(visits: list[Visit], check: str, verdict: str, ranks: list[int], figure: str, advice: str) -> None:
    """That the doctor says so, on rank 0 alone, and that all ranks end with the same exit code."""
    shown = checks(visits[0])
    assert (shown[check]["verdict"], shown[check]["ranks"]) == (verdict, ranks), shown
    assert figure in shown[check]["figure"]
    assert advice in shown[check]["advice"]
    assert {code for code, _, _ in visits} == {int(verdict == "fail")}
    assert all(out == "" for _, out, _ in visits[1:])


# -- nothing is wrong --------------------------------------------------------------------------------------------


def test_nothing_is_wrong_and_nothing_is_left_behind(tmp_path: Path) -> None:
    visits = run_ranks(doctor, 3, str(tmp_path), init=False)
    report = json.loads(visits[0][1])
    assert [visit[0] for visit in visits] == [0, 0, 0]
    assert (report["launcher"], report["size"], report["hosts"]) == ("torchrun", 3, [socket.gethostname()])
    shown = checks(visits[0])
    assert {each["verdict"] for each in shown.values()} <= {"ok", "warn"}
    assert [shown[name]["verdict"] for name in ("ranks", "code", "join", "gloo", "shared", "checkpoint")] == ["ok"] * 6
    assert shown["gloo"]["data"]["num_ranks"] == 3
    assert set(shown["gloo"]["data"]["ping_s"]) == {"1", "2"}
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_is_made_and_shown(tmp_path: Path) -> None:
    visits = run_ranks(doctor, 4, str(tmp_path), "--mesh", "dp=-1,tp=2", init=False)
    shown = checks(visits[0])
    assert shown["mesh"]["figure"] == "dp=2 x tp=2: 2 parts of the data, for ranks 0 and 1; ranks 2 and 3"
    assert (shown["mesh"]["verdict"], shown["join"]["verdict"]) == ("ok", "ok")
    visits = run_ranks(doctor, 2, str(tmp_path), "--mesh", "dp=3", init=False)
    found(visits, "mesh", "fail", [], "a mesh of 3 ranks, but there are 2", "whose product is the number of ranks")


def in_one_line(output: str) -> str:
    """However wide the terminal is."""
    return " ".join(output.split())


def test_under_torchrun_rank_zero_prints_one_table(tmp_path: Path) -> None:
    completed = torchrun("-m", 2, "dengine", "doctor", "--folder", str(tmp_path))
    assert completed.returncode == 0, completed.output
    assert completed.output.count("dengine doctor: 2 ranks on") == 1
    assert "  ok    launcher      torchrun set RANK and WORLD_SIZE" in completed.output
    # torchrun by itself dies of what a scheduler sends, and leaves its workers.
    assert "SIGUSR1, SIGUSR2 would kill torchrun itself" in in_one_line(completed.output)
    assert "\033" not in completed.output


# -- the faults --------------------------------------------------------------------------------------------------


def with_master(rank: int, size: int, folder: str, address: str, port: int) -> Visit:
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 hosts the store
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return doctor(rank, size, folder, "--wait", "1")


@pytest.mark.parametrize(
    ("address", "figure", "whispered"),
    [
        ("no-such-host.invalid", "'no-such-host.invalid' does not resolve", "does not resolve"),
        # Of a block of addresses that no host has (RFC 5737).
        ("192.0.2.1", "the master address 192.0.2.1 is not one of its own", "192.0.2.1"),
    ],
)
def test_a_wrong_master(tmp_path: Path, address: str, figure: str, whispered: str) -> None:
    visits = run_ranks(with_master, 2, str(tmp_path), address, free_port(), init=False)
    found(visits, "master", "fail", [], figure, "set MASTER_ADDR")
    assert whispered in visits[1][2]
    assert "rank 1 on " in visits[1][2]
    assert "MASTER_ADDR" in visits[1][2]


def test_a_closed_port(tmp_path: Path) -> None:
    # As under torchrun: the agent would listen there.
    visits = run_ranks(doctor, 2, str(tmp_path), "--wait", "1", init=False, env={"MASTER_PORT": str(free_port())})
    found(visits, "master", "fail", [], "nobody listens at the master's 127.0.0.1:", "torchrun's agent is running")
    assert "nobody listens" in visits[1][2]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        visits = run_ranks(with_master, 1, str(tmp_path), "127.0.0.1", port, init=False)
    found(visits, "master", "fail", [], f"cannot listen at 127.0.0.1:{port}", "set MASTER_PORT to another port")
    assert f"pid {os.getpid()})" in checks(visits[0])["master"]["figure"]


def one_device(rank: int, size: int, folder: str) -> None:
    gpu: Any = {"device": "cuda:0", "visible": "0", "num_visible": 1, "name": "H100", "identity": f"GPU-{max(rank, 1)}"}
    devices.device_facts = lambda launch: gpu


def planted(rank: int, size: int, folder: str, plant: Callable[..., Any], *options: str) -> Visit:
    return doctor(rank, size, folder, *options, plant=plant)


def test_two_ranks_on_one_device(tmp_path: Path) -> None:
    visits = run_ranks(planted, 3, str(tmp_path), one_device, init=False)
    figure = f"ranks 0 and 1 of {socket.gethostname()} all use one device, H100 GPU-1 (CUDA_VISIBLE_DEVICES=0"
    found(visits, "devices", "fail", [0, 1], figure, "unset CUDA_VISIBLE_DEVICES")
    assert checks(visits[0])["gloo"]["verdict"] == "ok"  # what needs no device is tried all the same


def with_code(rank: int, size: int, folder: str, code: str) -> Visit:
    return doctor(rank, size, folder, "--code", f"{code}/{rank}/train")


def test_other_code_on_one_rank(tmp_path: Path) -> None:
    for rank in range(3):
        package = tmp_path / "code" / str(rank) / "train"
        package.mkdir(parents=True)
        (package / "same.py").write_text("x = 1\n")
        (package / "step.py").write_text("lr = 0.1\n" if rank != 1 else "lr = 0.2\n")
    (tmp_path / "runs").mkdir()
    visits = run_ranks(with_code, 3, str(tmp_path / "runs"), str(tmp_path / "code"), init=False)
    found(visits, "code", "fail", [1], "other code on rank 1 than on the others: train/step.py differs", "up to date")


def test_an_old_copy_of_the_package_on_one_rank(tmp_path: Path) -> None:
    """As it happens: two bare processes, one of which finds another installation first."""
    old = tmp_path / "old"
    shutil.copytree(Path(sys.modules["dengine"].__file__ or "").parent, old / "dengine")
    with (old / "dengine/engine/loop.py").open("a") as file:
        file.write("# changed\n")
    (tmp_path / "runs").mkdir()
    script = (
        f"cd {tmp_path}/runs; export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}\n"
        f"RANK=1 PYTHONPATH={old}:$PYTHONPATH {sys.executable} -m dengine doctor --wait 40 & other=$!\n"
        f"RANK=0 {sys.executable} -m dengine doctor --wait 40; echo rank 0: $?\n"
        "wait $other; echo rank 1: $?\n"
    )
    completed = run_command("bash", "-c", script, deadline_s=120)
    assert "rank 0: 1\nrank 1: 1\n" in completed.output
    assert "other code on rank 1 than on the others: dengine/engine/loop.py differs" in in_one_line(completed.output)
    assert "hosted by rank 0" in completed.output
    assert completed.output.count("\n  fail") == 1


def mounted(path: str, options: str, flags: int = 0, bind: bool = False) -> None:
    """For this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    is_private, is_bind, is_remounted = 1 << 18 | 1 << 14, 1 << 12, 1 << 5
    steps: list[tuple[Any, ...]] = [(b"none", b"/", None, is_private, None)]
    if bind:
        steps += [(path.encode(), path.encode(), None, is_bind, None)]
        steps += [(None, path.encode(), None, is_bind | is_remounted | flags, None)]
    else:
        steps += [(b"tmpfs", path.encode(), b"tmpfs", flags, options.encode())]
    if libc.unshare(0x20000) or any(libc.mount(*step) for step in steps):
        raise OSError(ctypes.get_errno(), "cannot mount")


def read_only_on_rank_one(rank: int, size: int, folder: str) -> None:
    if rank == 1:
        mounted(folder, "", flags=1, bind=True)


def full(rank: int, size: int, folder: str) -> None:
    mounted(folder, "size=256k")
    with pytest.raises(OSError, match="No space"):
        Path(folder, "filler").write_bytes(bytes(1 << 20))


def another_volume_on_rank_two(rank: int, size: int, folder: str) -> None:
    if rank == 2:
        mounted(folder, "size=64m")


def may_mount(rank: int, size: int, folder: str) -> bool:
    try:
        mounted(folder, "size=64k")
    except OSError:
        return False
    return True


@pytest.fixture
def mountable(tmp_path: Path) -> Path:
    if os.geteuid() != 0 or run_ranks(may_mount, 1, str(tmp_path), init=False) != [True]:
        pytest.skip("a process may mount nothing here: run the tests as root (in a container: --privileged)")
    return tmp_path


def test_a_folder_that_one_rank_may_only_read(mountable: Path) -> None:
    visits = run_ranks(planted, 2, str(mountable), read_only_on_rank_one, init=False)
    figure = f"{mountable} cannot be written by rank 1: Read-only file system"
    found(visits, "folder", "fail", [1], figure, "mounted read-only: pass a folder that ranks may write to by --folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    visits = run_ranks(doctor, 1, str(tmp_path), init=False)
    found(visits, "folder", "fail", [0], "Permission denied", "change its owner or mode")


def test_a_folder_that_is_full(mountable: Path) -> None:
    visits = run_ranks(planted, 2, str(mountable), full, init=False)
    figure = f"{mountable} cannot be written by ranks 0 and 1: No space left on device"
    found(visits, "folder", "fail", [0, 1], figure, "it is full: remove what is not needed")


def test_a_folder_that_is_not_the_same_volume_everywhere(mountable: Path) -> None:
    visits = run_ranks(planted, 3, str(mountable), another_volume_on_rank_two, init=False)
    found(visits, "shared", "fail", [2], "rank 2 does not see what rank 0", "a file system that all hosts share")
    assert checks(visits[0])["folder"]["verdict"] != "fail"


def with_folder(rank: int, size: int, folder: str) -> Visit:
    return doctor(rank, size, f"{folder}/{rank}")


def test_a_folder_of_each_ranks_own(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    visits = run_ranks(with_folder, 2, str(tmp_path), init=False)
    found(visits, "shared", "fail", [1], f"(theirs is {tmp_path}/1, not {tmp_path}/0)", "by its absolute path")
    assert checks(visits[0])["checkpoint"]["verdict"] == "fail"  # what a training would have met


def half_set(rank: int, size: int, folder: str) -> None:
    del os.environ["WORLD_SIZE" if rank == 0 else "MASTER_ADDR"]


def test_half_set_variables(tmp_path: Path) -> None:
    visits = run_ranks(planted, 2, str(tmp_path), half_set, init=False)
    figure = "WORLD_SIZE is not set, although RANK=0, MASTER_ADDR=127.0.0.1, MASTER_PORT="
    found(visits, "launcher", "fail", [], figure, "Start the script with torchrun or srun")
    assert "rank 1 on " in visits[1][2]
    assert "MASTER_ADDR is not set" in visits[1][2]


def late_clock(rank: int, size: int, folder: str) -> None:
    if rank == 1:
        true_time = time.time
        time.time = lambda: true_time() - 90.0


def test_a_skewed_clock(tmp_path: Path) -> None:
    visits = run_ranks(planted, 3, str(tmp_path), late_clock, init=False)
    found(visits, "clock", "warn", [1], "rank 1 is 90.0 s behind rank 0", "set the clocks by NTP")
    ahead = checks(visits[0])["clock"]["data"]["ahead_s"]
    assert abs(ahead["1"] + 90.0) < 1.0
    assert abs(ahead["2"]) < 1.0


def as_one_of_three(rank: int, size: int, folder: str, shift: int) -> Visit:
    os.environ |= {"RANK": str(rank + shift), "LOCAL_RANK": str(rank + shift), "WORLD_SIZE": "3"}
    return doctor(rank, size, folder)


@pytest.mark.parametrize(("shift", "missing"), [(0, 2), (1, 0)])
def test_a_rank_that_never_comes(tmp_path: Path, shift: int, missing: int) -> None:
    visits = run_ranks(as_one_of_three, 2, str(tmp_path), shift, init=False)
    figure = f"rank {missing} never came: 2 of 3 are here after 4 s"
    found(visits, "ranks", "fail", [missing], figure, "see that they were started")
    assert checks(visits[0])["join"]["verdict"] == "skip"
    assert checks(visits[0])["clock"]["verdict"] == "ok"  # what can be asked without it is


def hasty(limit_s: float) -> None:
    group.LIMIT_S = limit_s
    group.is_hanging = lambda: False  # else the process would end at once, and not tell this harness


def killed_in_the_group(rank: int, size: int, folder: str) -> None:
    hasty(15.0)
    if rank == 1:
        group.exercise = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_in_the_midst(tmp_path: Path) -> None:
    outcomes = run_ranks(
        planted, 2, str(tmp_path), killed_in_the_group, init=False, expect_failures=True, deadline_s=80
    )
    assert outcomes[1].error_type == "ProcessDied"
    assert outcomes[0].value is not None
    code, shown = outcomes[0].value[0], checks(outcomes[0].value)
    assert code == 1
    assert (shown["ranks"]["verdict"], shown["ranks"]["ranks"]) == ("fail", [1])
    assert "rank 1 stopped answering at: group" in shown["ranks"]["figure"]


@contextmanager
def never_joined(*args: Any, **kwargs: Any) -> Iterator[None]:
    time.sleep(1000)
    yield


def stuck_in_the_group(rank: int, size: int, folder: str) -> None:
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text()
    hasty(15.0)
    if rank == 1:
        distributed.process_group = never_joined


def test_a_rank_that_hangs_while_it_joins(tmp_path: Path) -> None:
    (tmp_path / "port").write_text(str(free_port()))
    outcomes = run_ranks(planted, 2, str(tmp_path), stuck_in_the_group, init=False, expect_failures=True, deadline_s=30)
    visits = [outcome.value for outcome in outcomes if outcome.value is not None]
    assert [visit[0] for visit in visits] == [1, 1]
    shown = checks(visits[0])
    assert (shown["join"]["verdict"], shown["join"]["ranks"]) == ("fail", [0, 1])
    assert "no answer after 15 s" in shown["join"]["figure"]
    assert "GLOO_SOCKET_IFNAME" in shown["join"]["advice"]


def deaf(rank: int, size: int, folder: str) -> None:
    if rank == 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def test_a_signal_that_does_not_reach_a_rank(tmp_path: Path) -> None:
    visits = run_ranks(planted, 2, str(tmp_path), deaf, init=False)
    found(visits, "signals", "fail", [1], "SIGUSR1 does not reach rank 1", "could not save when it is preempted")


def all_rank_zero(rank: int, size: int, folder: str) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}


def test_two_processes_that_are_one_rank(tmp_path: Path) -> None:
    visits = run_ranks(planted, 2, str(tmp_path), all_rank_zero, init=False)
    printed, whispered = sorted(visits, key=lambda visit: visit[1] == "")
    assert [code for code, _, _ in visits] == [1, 1]
    assert checks(printed)["ranks"]["verdict"] == "fail"
    assert "another process is this rank too" in whispered[2]
