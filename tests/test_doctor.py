"""What the doctor makes of the figures that ranks bring, and how it shows it. With real ranks: tests_dist."""

import io
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dengine.__main__ import main
from dengine.launch.env import choose_launch
from dengine.tools.doctor import clock, devices, folder, group, interfaces, launcher, limits, master, mesh, software
from dengine.tools.doctor.report import Finding, Header, Report, Verdict, ranks_text

HOSTS = {0: "node1", 1: "node1", 2: "node2", 3: "node2"}
AT_MASTER = {
    "name": "localhost",
    "address": "127.0.0.1",
    "port": 1,
    "is_host": False,
    "connect_s": 0.001,
    "lookup_s": 0.001,
}
LAUNCHER = re.compile(r"(RANK|WORLD_SIZE|LOCAL_|GROUP_|MASTER_|TORCHELASTIC|SLURM|OMPI_|PMI_|GLOO_|NCCL_).*")


@pytest.fixture(autouse=True)
def nobody_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in filter(LAUNCHER.fullmatch, dict(os.environ)):
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def of_each(name: str, *values: Any) -> Any:
    return {rank: {name: value} for rank, value in enumerate(values)}


# -- alone -------------------------------------------------------------------------------------------------------


def test_alone_it_is_a_table_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--folder", str(tmp_path / "not" / "there")])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert shown.startswith(f"dengine doctor: one process on {socket.gethostname()}\n")
    assert "\n  ok    launcher      neither torchrun nor srun set any variables\n" in shown
    assert "not/there (does not exist yet)" in " ".join(shown.split())
    assert re.search(r"\n  ok    checkpoint    1 MB there and back", shown)
    assert "\033" not in shown
    assert list(tmp_path.iterdir()) == []


def test_half_set_variables_are_a_failure_and_the_rest_is_looked_at_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor", "--json", "--folder", str(tmp_path)]) == 1
    report = json.loads(capsys.readouterr().out)
    shown = {each["check"]: each for each in report["checks"]}
    assert report["verdict"] == "fail"
    assert shown["launcher"]["figure"].startswith("WORLD_SIZE is not set, although RANK=0 is")
    assert shown["launcher"]["advice"].startswith("Start the script with torchrun or srun")
    assert shown["folder"]["verdict"] in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_file_where_the_folder_should_be_is_a_failure(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    found = folder.judge_folder({0: folder.probe_folder(Path(f"{tmp_path}/file{below}"), "m", 0)}, {0: "node1"})
    assert found.verdict is Verdict.FAIL
    assert found.figure.startswith(f"{tmp_path}/file cannot be written by")
    assert "it is not a folder" in found.figure
    assert "pass a folder" in found.advice
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("options", [["--code", "no/such/folder"], ["--wait", "0"]])
def test_arguments_that_make_no_sense(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert options[1] in shown.err


# -- the report --------------------------------------------------------------------------------------------------


def test_the_worst_finding_decides_and_advice_stands_below_its_line() -> None:
    out = io.StringIO()
    report = Report(out, as_json=False)
    report.open(Header("slurm", 4, ("node1", "node2")))
    report.add(Finding("ranks", Verdict.OK, "4 of 4 came"))
    report.add(Finding("clock", Verdict.WARN, "rank 1 is 2.0 s ahead of rank 0", "set the clocks", (1,)))
    assert report.verdict is Verdict.WARN
    report.add(Finding("code", Verdict.FAIL, "other code", "bring it up to date", (1,)))
    report.close()
    lines = re.sub(r"\d\.\d s\)", "0.0 s)", out.getvalue()).splitlines()
    assert lines == [
        "dengine doctor: 4 ranks on 2 hosts",
        "",
        "  ok    ranks         4 of 4 came",
        "  warn  clock         rank 1 is 2.0 s ahead of rank 0",
        "        -> set the clocks",
        "  fail  code          other code",
        "        -> bring it up to date",
        "",
        "training would fail (1 ok, 1 warn, 1 fail; 0.0 s)",
    ]


def test_many_ranks_are_counted_and_hosts_named_where_there_are_several() -> None:
    assert ranks_text([2], HOSTS) == "rank 2 (node2)"
    assert ranks_text([1, 0]) == "ranks 0 and 1"
    assert ranks_text([1], {0: "here", 1: "here"}) == "rank 1"
    assert ranks_text(range(100)) == "ranks 0, 1, 2, 3, 4, 5, 6 and 93 more"


# -- launchers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "message", "advice"),
    [
        (
            # Left over in a job script, or exported by hand: four tasks that each take themselves for the only rank.
            {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "node1",
                "MASTER_PORT": "29500",
                "SLURM_PROCID": "3",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_JOB_ID": "7",
            },
            "srun started 4 tasks, but WORLD_SIZE=1 is set too",
            "unset RANK and WORLD_SIZE",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            "mpirun started 4 processes",
            "by torchrun or srun",
        ),
    ],
)
def test_variables_of_two_launchers_that_contradict_each_other(env: dict[str, str], message: str, advice: str) -> None:
    told = launcher.launch_facts(choose_launch(env), env)
    found = launcher.judge_launcher(of_each("launch", told), HOSTS)
    assert found.verdict is Verdict.FAIL
    assert message in found.figure
    assert advice in found.advice


def test_torchrun_with_more_ranks_than_tasks_is_no_contradiction() -> None:
    env = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    env |= {"TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"}
    found = launcher.judge_launcher(of_each("launch", launcher.launch_facts(choose_launch(env), env)), HOSTS)
    assert (found.verdict, found.figure) == (
        Verdict.OK,
        "torchrun set RANK and WORLD_SIZE; they win over SLURM's, which are set too",
    )


def test_a_variable_of_nccl_that_differs_on_one_rank_is_named() -> None:
    told = [{"tuning": {"NCCL_IB_DISABLE": "1"}}, {"tuning": {"NCCL_IB_DISABLE": "1"}}, {"tuning": {}}]
    found = launcher.judge_variables(of_each("launch", *told), HOSTS)
    assert (found.verdict, found.ranks) == (Verdict.WARN, (2,))
    assert "NCCL_IB_DISABLE is not set on rank 2 (node2), and '1' on the others" in found.figure


def test_a_master_that_is_a_loopback_address_is_doubtful_with_several_hosts() -> None:
    facts = of_each("master", AT_MASTER, AT_MASTER, AT_MASTER)
    assert master.judge_master(facts, HOSTS).verdict is Verdict.WARN
    assert master.judge_master(facts, dict.fromkeys(HOSTS, "node1")).verdict is Verdict.OK


def test_a_name_server_that_does_not_answer_is_told_with_the_rank_that_waits_for_it() -> None:
    facts = of_each("master", AT_MASTER, AT_MASTER, {**AT_MASTER, "lookup_s": 5.004})
    found = master.judge_master(facts, dict.fromkeys(HOSTS, "node1"))
    assert found.verdict is Verdict.WARN
    assert "what 127.0.0.1 is called takes 5.0 s (rank 2)" in found.figure
    assert "RES_OPTIONS" in found.advice


# -- software ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "verdict"), [("torch", Verdict.FAIL), ("numpy", Verdict.WARN)])
def test_another_version_on_one_rank(name: str, verdict: Verdict) -> None:
    same = {"dengine": "1", "torch": "2.13.0", "cuda": "none", "nccl": "none", "python": "3.11", "numpy": "2.0"}
    found = software.judge_versions(of_each("versions", same, same, {**same, name: "1.9"}), HOSTS)
    assert (found.verdict, found.ranks) == (verdict, (2,))
    assert f"{name} is 1.9 on rank 2 (node2), and {same[name]} on the others" in found.figure


def test_code_is_compared_file_by_file_by_its_name_below_the_folder(tmp_path: Path) -> None:
    for host in ("a", "b"):
        (tmp_path / host / "train" / "__pycache__").mkdir(parents=True)
        (tmp_path / host / "train" / "step.py").write_text("x = 1\n")
        (tmp_path / host / "train" / "__pycache__" / "step.py").write_text(host)  # what is not source does not count
    first, second = (software.code_facts([tmp_path / host / "train"]) for host in ("a", "b"))
    assert first == second
    assert "train/step.py" in first
    (tmp_path / "b" / "train" / "more.py").touch()
    found = software.judge_code(of_each("code", first, software.code_facts([tmp_path / "b" / "train"])), HOSTS)
    assert (found.verdict, found.ranks) == (Verdict.FAIL, (1,))
    assert "train/more.py differs" in found.figure


# -- devices and limits ------------------------------------------------------------------------------------------


def gpu(identity: str, **more: Any) -> Any:
    facts = {"device": "cuda:0", "visible": None, "num_visible": 1, "name": "H100", "identity": identity}
    return {**facts, "has_unused_gpu": False, **more}


CPU = {"device": "cpu", "visible": None, "num_visible": 0, "name": "CPU", "identity": None, "has_unused_gpu": False}


@pytest.mark.parametrize(
    ("told", "verdict", "ranks", "figure"),
    [
        ([gpu("a"), gpu("b"), gpu("a"), gpu("b")], Verdict.OK, (), "one H100 for each rank"),
        ([gpu("a"), gpu("b"), gpu("c"), gpu("c")], Verdict.FAIL, (2, 3), "ranks 2 and 3 of node2 all use one device"),
        ([gpu("a"), CPU, gpu("a"), gpu("b")], Verdict.FAIL, (1,), "rank 1 (node1) would train on the CPU"),
        (
            [gpu("a"), gpu("none", device="cuda:1", is_missing=True), gpu("a"), gpu("b")],
            Verdict.FAIL,
            (1,),
            "rank 1 (node1) would use cuda:1, but only 1 GPUs are shown there",
        ),
        ([CPU, CPU, CPU, CPU], Verdict.OK, (), "the CPU"),
        ([CPU, CPU, CPU, {**CPU, "has_unused_gpu": True}], Verdict.WARN, (3,), "has an NVIDIA driver"),
    ],
)
def test_each_rank_has_a_device_of_its_own(
    told: list[dict[str, Any]], verdict: Verdict, ranks: tuple[int, ...], figure: str
) -> None:
    found = devices.judge_devices(of_each("device", *told), HOSTS)
    assert (found.verdict, found.ranks) == (verdict, ranks)
    assert figure in found.figure


def test_more_threads_than_cpus() -> None:
    told = [{"cpus": [0, 1, 2, 3], "num_threads": 4}] * 2
    found = devices.judge_threads(of_each("threads", *told), HOSTS)
    assert found.verdict is Verdict.WARN
    assert "OMP_NUM_THREADS=2" in found.advice
    assert devices.judge_threads(of_each("threads", told[0]), HOSTS).verdict is Verdict.OK


ROOMY = {
    "num_files": 65536,
    "num_files_hard": 65536,
    "address_space": -1,
    "memory_locked": 8 << 20,
    "has_infiniband": False,
    "memory_free": 64 << 30,
    "shm": {"total": 32 << 30, "free": 32 << 30},
}


@pytest.mark.parametrize(
    ("judge", "changed", "verdict", "advice"),
    [
        (limits.judge_files, {"num_files": 1024}, Verdict.WARN, "ulimit -n 65536"),
        (limits.judge_memory, {"memory_free": 1 << 29}, Verdict.WARN, "--mem"),
        (limits.judge_memory, {"address_space": 1 << 29}, Verdict.WARN, "ulimit -v"),
        (limits.judge_memory, {"has_infiniband": True}, Verdict.WARN, "ulimit -l unlimited"),
        (limits.judge_shared_memory, {"shm": {"total": 64 << 20, "free": 64 << 20}}, Verdict.WARN, "--shm-size"),
        (limits.judge_shared_memory, {"shm": {"total": 64 << 20, "free": 0}}, Verdict.FAIL, "what is left over there"),
        (limits.judge_shared_memory, {"shm": None}, Verdict.FAIL, "--shm-size"),
    ],
)
def test_a_limit_that_is_low_on_one_host(judge: Any, changed: dict[str, Any], verdict: Verdict, advice: str) -> None:
    facts = of_each("limits", ROOMY, ROOMY, {**ROOMY, **changed})
    assert judge(of_each("limits", ROOMY, ROOMY, ROOMY), HOSTS).verdict is Verdict.OK
    found = judge(facts, HOSTS)
    assert (found.verdict, found.ranks) == (verdict, (2,))
    assert advice in found.advice


@pytest.mark.parametrize(
    ("num_ranks", "soft", "hard", "advice"),
    [
        (64, 4096, 65536, "`ulimit -n 65536`"),
        (64, 4096 + 3 * 64, 65536, ""),
        (10_000, 32_768, 65536, "`ulimit -n 65536`"),
        (10_000, 34_096, 34_096, ""),
        (10_000, 4096, 16_384, "More than 16384 takes an administrator"),
        (30_000, 65536, -1, "`ulimit -n 94096`"),
    ],
)
def test_the_host_of_the_store_needs_three_files_for_each_rank(
    num_ranks: int, soft: int, hard: int, advice: str
) -> None:
    others = {**ROOMY, "num_files": 4096}
    facts = of_each("limits", {**ROOMY, "num_files": soft, "num_files_hard": hard}, *[others] * (num_ranks - 1))
    found = limits.judge_files(facts, dict.fromkeys(range(num_ranks), "node"))
    assert (found.verdict, found.ranks) == ((Verdict.WARN, (0,)) if advice else (Verdict.OK, ()))
    assert advice in found.advice


# -- network and clock -------------------------------------------------------------------------------------------


def interface(**changed: Any) -> Any:
    names = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}
    told = {"interfaces": names, "gloo_named": "", "nccl_named": "", "own_name": "node", "infiniband": []}
    return {**told, "gloo": "10.0.0.7", "route": "10.0.0.7", **changed}


@pytest.mark.parametrize(
    ("changed", "verdict", "text"),
    [
        # Debian's own entry in /etc/hosts.
        ({"gloo": "127.0.1.1"}, Verdict.WARN, "export GLOO_SOCKET_IFNAME=eth0"),
        ({"gloo": None, "gloo_named": "eth1"}, Verdict.FAIL, "GLOO_SOCKET_IFNAME=eth1 on rank 2 (node2), which has lo"),
        ({"nccl_named": "=ib"}, Verdict.FAIL, "NCCL_SOCKET_IFNAME==ib on rank 2 (node2)"),
    ],
)
def test_an_interface_that_the_others_cannot_reach(changed: dict[str, Any], verdict: Verdict, text: str) -> None:
    told = [interface(), interface(), interface(**changed), interface()]
    found = interfaces.judge_interfaces(of_each("interfaces", *told), HOSTS)
    assert (found.verdict, found.ranks) == (verdict, (2,))
    assert text in f"{found.figure} {found.advice}"


@pytest.mark.parametrize("named", ["", "ib", "^docker", "=eth0"])
def test_interfaces_that_are_there_are_told(named: str) -> None:
    told = [interface(), interface(gloo="10.0.0.8", interfaces={"eth0": "10.0.0.8", "ib0": "10.1.0.8"})]
    found = interfaces.judge_interfaces(of_each("interfaces", *({**each, "nccl_named": named} for each in told)), HOSTS)
    nccl = f"; NCCL_SOCKET_IFNAME={named}" if named else ""
    assert (found.verdict, found.figure) == (Verdict.OK, f"Gloo takes eth0 (10.0.0.7, 10.0.0.8){nccl}")


@pytest.mark.parametrize(
    ("ahead", "verdict"), [(0.2, Verdict.OK), (-1.5, Verdict.WARN), (90.0, Verdict.WARN), (-400.0, Verdict.FAIL)]
)
def test_clocks_that_are_apart(ahead: float, verdict: Verdict) -> None:
    same = {"ahead_s": 0.001, "uncertain_s": 0.0005}
    found = clock.judge_clock({1: same, 2: {**same, "ahead_s": ahead}}, 0, HOSTS)
    assert found.verdict is verdict
    if verdict is not Verdict.OK:
        way = "ahead of" if ahead > 0 else "behind"
        assert found.figure == f"rank 2 (node2) is {abs(ahead):.1f} s {way} rank 0"
        assert found.ranks == (2,)


def exercised(seconds: float = 0.1, *, is_right: bool = True, pings: dict[str, float] | None = None) -> Any:
    sizes = [{"bytes": size, "seconds": seconds, "is_right": is_right} for size in (4, 64 << 10, 1 << 20, 16 << 20)]
    join = {"seconds": 0.1, "backend": "gloo"}
    saved = {"save_s": 0.1, "verify_s": 0.1, "load_s": 0.1, "is_equal": True}
    return {"join": join, "reduced": {"gloo": sizes}, "pings": pings or {}, "checkpoint": saved}


def verdicts(found: list[Finding]) -> dict[str, Verdict]:
    return {each.check: each.verdict for each in found}


def test_a_wrong_sum_on_one_rank_is_a_failure() -> None:
    found = group.judge_group({0: exercised(), 1: exercised(is_right=False)}, HOSTS)
    assert verdicts(found) == {"join": Verdict.OK, "gloo": Verdict.FAIL, "checkpoint": Verdict.OK}
    assert found[1].ranks == (1,)


def test_the_slowest_rank_is_named_and_warned_of_where_it_stands_out() -> None:
    even = {rank: exercised(pings={"1": 0.001, "2": 0.002, "3": 0.001}) for rank in range(4)}
    found = group.judge_group(even, HOSTS)[1]
    assert (found.verdict, found.ranks) == (Verdict.OK, ())
    assert "slowest rank 2 (node2), 256 kB there and back 2.0 ms" in found.figure
    assert "16 MB 100.0 ms = 0.17 GB/s" in found.figure
    odd = {rank: exercised(pings={"1": 0.001, "2": 0.050, "3": 0.001}) for rank in range(4)}
    found = group.judge_group(odd, HOSTS)[1]
    assert (found.verdict, found.ranks) == (Verdict.WARN, (2,))


def test_who_failed_by_itself_is_named_and_not_who_was_told_of_it() -> None:
    own: Any = {"failed": {"step": "join", "error": "RuntimeError: Connection refused"}}
    told: Any = {"failed": {"step": "join", "error": "RemoteRankError: rank 1 failed"}}
    found = group.judge_group({0: told, 1: own, 2: told}, HOSTS)
    assert (found[0].verdict, found[0].ranks) == (Verdict.FAIL, (1,))
    assert "Connection refused" in found[0].figure
    assert verdicts(found)["checkpoint"] is Verdict.SKIP


# -- the folder --------------------------------------------------------------------------------------------------


def probe(**changed: Any) -> Any:
    told = {"folder": "/runs", "base": "/runs", "part": "/runs/.x", "free": 1 << 40, "has_inodes": True}
    return {**told, "flush_s": [0.001] * 5, "is_whole": True, **changed}


@pytest.mark.parametrize(
    ("changed", "verdict", "text"),
    [
        ({}, Verdict.OK, "/runs: 1099.5 GB free"),
        ({"free": 1 << 30}, Verdict.WARN, "n_saved + 1"),
        ({"has_inodes": False}, Verdict.WARN, "no more files can be made"),
        ({"flush_s": [0.4] * 5}, Verdict.WARN, "asynchronous=True"),
        ({"is_whole": False}, Verdict.FAIL, "POSIX file system"),
        ({"error": "Disk quota exceeded", "errno": 122}, Verdict.FAIL, "quota is used up"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_with_a_way_out(
    changed: dict[str, Any], verdict: Verdict, text: str
) -> None:
    found = folder.judge_folder({0: probe(), 1: probe(), 2: probe(**changed)}, HOSTS)
    assert found.verdict is verdict
    assert text in f"{found.figure} {found.advice}"
    if verdict is not Verdict.OK:
        assert found.ranks == (2,)


# -- the mesh ----------------------------------------------------------------------------------------------------


def test_a_mesh_on_one_host_or_within_hosts_is_shown() -> None:
    found = mesh.judge_mesh({"dp_shard": -1, "tp": 2}, 4, HOSTS)
    assert (found.verdict, found.data) == (Verdict.OK, {"sizes": {"dp_shard": 2, "tp": 2}})
    assert found.figure == "dp_shard=2 x tp=2: 2 parts of the data, for ranks 0 and 1; ranks 2 and 3"
    assert mesh.judge_mesh({"dp": 4}, 4, HOSTS).figure == "dp=4: 4 parts of the data"
    assert mesh.judge_mesh({"tp": 1, "pp": 4}, 4, HOSTS).verdict is Verdict.OK


def test_tensor_parallel_ranks_on_several_hosts_are_a_warning() -> None:
    found = mesh.judge_mesh({"tp": 2, "dp": 2}, 4, HOSTS)
    assert (found.verdict, found.ranks) == (Verdict.WARN, (0, 2, 1, 3))
    assert "2 of the groups along tp span hosts: ranks 0 (node1) and 2 (node2)" in found.figure
    assert "name it last" in found.advice


def test_a_mesh_that_does_not_fit_is_a_failure() -> None:
    found = mesh.judge_mesh({"dp": 3, "tp": -1}, 4, HOSTS)
    assert found.verdict is Verdict.FAIL
    assert "3 ranks to each place along tp, which does not divide the 4" in found.figure


@pytest.mark.parametrize("text", ["dp", "dp=", "dp=two", "dp=2,dp=2", "dp=2;tp=2", "x=2", "dp=0", "dp=-1,tp=-1", ""])
def test_a_mesh_that_is_none_is_a_wrong_argument(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--mesh", text]) == 2
    assert "doctor --help" in capsys.readouterr().err


def test_alone_it_can_make_a_mesh_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path), "--mesh", "dp_shard=-1,tp=1", "--json"]) == 0
    found = {each["check"]: each for each in json.loads(capsys.readouterr().out)["checks"]}
    assert found["mesh"]["figure"] == "dp_shard=1 x tp=1: 1 part of the data"
