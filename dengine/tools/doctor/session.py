"""A session of the doctor: the order of the checks, and the roles of the ranks."""

import argparse
import os
import shutil
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dengine.errors import LaunchError
from dengine.launch.env import Choice, Launch, choose_launch
from dengine.launch.mesh import mesh_sizes
from dengine.tools.arguments import a_path
from dengine.tools.doctor import clock, devices, folder, group, interfaces, launcher, limits, master, mesh, software
from dengine.tools.doctor.exchange import Exchange, StoreLostError, open_exchange
from dengine.tools.doctor.facts import FolderFacts, GroupFacts, RankFacts
from dengine.tools.doctor.master import MasterError
from dengine.tools.doctor.report import Finding, Header, Report, Verdict, ranks_text

__all__ = ["configure", "run"]

_STEP_S = 20.0  # for a step that all ranks do together
_SLACK_S = 3.0
_JUDGES = (  # for the facts that each rank measures by itself
    launcher.judge_variables,
    software.judge_versions,
    software.judge_code,
    devices.judge_devices,
    devices.judge_threads,
    interfaces.judge_interfaces,
    limits.judge_files,
    limits.judge_memory,
    limits.judge_shared_memory,
    limits.judge_signals,
)


@dataclass(frozen=True)
class _Session:
    """The options and measurements of this process, and the store through which it reaches the others."""

    options: argparse.Namespace
    exchange: Exchange
    facts: RankFacts


class _RanksLostError(Exception):
    """Some ranks came, and then stopped answering."""

    def __init__(self, ranks: set[int], doing: str) -> None:
        super().__init__(f"{ranks_text(ranks)} stopped answering at: {doing}")
        self.ranks = tuple(sorted(ranks))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=a_path, default=Path(), help="where checkpoints go (default: this folder)")
    parser.add_argument(
        "--code",
        type=a_path,
        nargs="+",
        default=[],
        help="files or folders that must be equal on all ranks",
    )
    parser.add_argument(
        "--mesh", metavar="NAME=SIZE,...", help="as process_group(mesh=) will have it: dp_shard=-1,tp=2"
    )
    parser.add_argument("--wait", type=float, default=20.0, metavar="S", help="seconds for ranks to come (default: 20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def run(options: argparse.Namespace) -> int:
    """Run the checks. Gives 0 if a training would work, 1 if it would fail (see the report), 2 for wrong arguments."""
    report = Report(sys.stdout, as_json=options.json)
    try:
        if not options.wait > 0:
            raise ValueError(f"--wait {options.wait} is no number of seconds above 0.")
        options.mesh = None if options.mesh is None else mesh_sizes(options.mesh)
        code = software.code_facts(options.code)
    except (OSError, TypeError, ValueError) as error:
        print(f"{error} See python -m dengine doctor --help.", file=sys.stderr)
        return 2
    try:
        choice = choose_launch(os.environ)
    except LaunchError as error:
        facts = _measured(Choice(None, "half set"), code)
        return _alone(options, report, facts, launcher.half_set(error), launcher.claimed_rank(os.environ))
    facts = _measured(choice, code)
    rank = 0 if choice.launch is None else choice.launch.rank
    try:
        facts["master"] = master.reach_master(choice.launch, options.wait)
        exchange = open_exchange(choice.launch, options.wait)
    except (MasterError, RuntimeError, OSError) as error:
        return _alone(options, report, facts, master.unreachable(error), rank)
    try:
        return _ended(_examine_together(_Session(options, exchange, facts), report))
    except (StoreLostError, TimeoutError) as error:
        return _ended(_complain(rank, f"the others stopped answering: {error}"))


def _ended(code: int) -> int:
    if group.is_hanging():
        sys.stdout.flush()
        os._exit(code)
    return code


def _measured(choice: Choice, code: dict[str, str]) -> RankFacts:
    launch: Launch | None = choice.launch
    return {
        "host": socket.gethostname(),
        "launch": launcher.launch_facts(choice, os.environ),
        "master": {},
        "versions": software.version_facts(),
        "code": code,
        "device": devices.device_facts(launch),
        "threads": devices.thread_facts(),
        "interfaces": interfaces.interface_facts(launch),
        "limits": limits.limit_facts(),
        "signals": limits.signal_facts(),
    }


# -- together ----------------------------------------------------------------------------------------------------


def _examine_together(session: _Session, report: Report) -> int:
    exchange, wait_s = session.exchange, session.options.wait
    if exchange.count(f"taken/{exchange.rank}") > 1:
        exchange.answer(
            f"twice/{exchange.rank}", f"rank {exchange.rank}, on {session.facts['host']} (pid {os.getpid()})"
        )
        return _complain(exchange.rank, "another process is this rank too: each needs a RANK of its own")
    exchange.post("facts", session.facts)
    came = exchange.collect("facts", range(exchange.size), wait_s)
    # The first rank that gets here decides which ranks take part, so that all have the same list.
    plan = exchange.decide("plan", {"here": sorted(came), "session_id": uuid.uuid4().hex[:8]})
    if exchange.rank not in plan["here"]:
        return _complain(
            exchange.rank, f"came after the others had stopped waiting ({wait_s:g} s): try a longer --wait"
        )
    probe = folder.probe_folder(session.options.folder, plan["session_id"], exchange.rank)
    try:
        if exchange.rank == plan["here"][0]:
            return _coordinate(session, report, plan, probe)
        return _take_part(session, plan, probe)
    finally:
        folder.leave_folder(probe, exchange.rank)


def _take_part(session: _Session, plan: dict[str, Any], probe: FolderFacts) -> int:
    """Take part on a rank that is not the coordinator, in the order of `_examine`. Gives the exit code."""
    exchange, coordinator = session.exchange, plan["here"][0]
    exchange.post("clock", clock.ask_clock(exchange, turn_s=_STEP_S))
    exchange.post("folder", probe)
    has_written = "error" not in exchange.read("folder", coordinator, _STEP_S)
    exchange.post("shared", has_written and folder.sees_file_of(probe, plan["session_id"], coordinator))
    backend = exchange.wait("backend", _STEP_S)
    if backend:
        exchange.post("group", _in_a_group(session, backend, probe))
    code = int(exchange.wait("code", _STEP_S + group.LIMIT_S))
    folder.leave_folder(probe, exchange.rank)
    exchange.post("left", True)
    return code


def _coordinate(session: _Session, report: Report, plan: dict[str, Any], probe: FolderFacts) -> int:
    """Collect, judge and print, on the coordinator. Gives the exit code."""
    exchange = session.exchange
    others = set(plan["here"]) - {exchange.rank}
    try:
        _examine(session, report, plan, probe)
    except _RanksLostError as error:
        others -= set(error.ranks)
        advice = "look at what they printed themselves: they were killed, crashed or hang."
        report.add(Finding("ranks", Verdict.FAIL, str(error), advice, error.ranks))
    except (StoreLostError, TimeoutError) as error:
        advice = "torchrun's agent, or whoever hosts the store, ended: look at what it printed."
        report.add(Finding("master", Verdict.FAIL, f"it stopped answering: {error}", advice))
    code = 1 if report.verdict is Verdict.FAIL else 0
    report.close()
    exchange.answer("code", str(code))
    exchange.collect("left", others, _STEP_S)  # the store ends with this process
    shutil.rmtree(probe["part"], ignore_errors=True)
    return code


def _examine(session: _Session, report: Report, plan: dict[str, Any], probe: FolderFacts) -> None:
    exchange = session.exchange
    here: list[int] = plan["here"]
    others = [rank for rank in here if rank != exchange.rank]
    facts = _all(exchange, "facts", here)
    hosts = {rank: str(each["host"]) for rank, each in facts.items()}
    report.open(Header(session.facts["launch"]["launcher"], exchange.size, tuple(dict.fromkeys(hosts.values()))))
    came = launcher.judge_came(facts, exchange, session.options.wait, hosts)
    report.add(launcher.judge_launcher(facts, hosts), master.judge_master(facts, hosts), came)
    if session.options.mesh is not None:
        report.add(mesh.judge_mesh(session.options.mesh, exchange.size, hosts))
    report.add(*(judge(facts, hosts) for judge in _JUDGES))
    try:
        clock.answer_clock(exchange, others)
    except TimeoutError as error:
        raise _RanksLostError({int(str(error).split("/")[2])}, "clock") from error
    report.add(clock.judge_clock(_all(exchange, "clock", others), exchange.rank, hosts))
    exchange.post("folder", probe)
    probes = _all(exchange, "folder", here)
    report.add(folder.judge_folder(probes, hosts))
    report.add(folder.judge_shared(_all(exchange, "shared", others), probes, exchange.rank, hosts))
    backend = "" if came.verdict is Verdict.FAIL else _backend(report)
    exchange.answer("backend", backend)
    if not backend:
        report.add(Finding("join", Verdict.SKIP, "a process group needs all ranks"))
        return
    until = time.monotonic() + group.LIMIT_S + _SLACK_S
    exchange.post("group", _in_a_group(session, backend, probe))
    report.add(*group.judge_group(_all(exchange, "group", here, until - time.monotonic()), hosts))


def _in_a_group(session: _Session, backend: str, probe: FolderFacts) -> GroupFacts:
    return group.exercise(backend, Path(probe["part"]), mesh=session.options.mesh)


def _all(exchange: Exchange, topic: str, ranks: list[int], timeout_s: float | None = None) -> dict[int, Any]:
    found = exchange.collect(topic, ranks, _STEP_S if timeout_s is None else timeout_s)
    if len(found) < len(ranks):
        raise _RanksLostError(set(ranks) - found.keys(), topic)
    return found


def _backend(report: Report) -> str:
    """The backend to try. It is not NCCL if ranks share a device, as that would only hang or fail."""
    is_bad = any(finding.check == "devices" and finding.verdict is Verdict.FAIL for finding in report.findings)
    return "gloo" if is_bad else "auto"


# -- alone -------------------------------------------------------------------------------------------------------


def _alone(options: argparse.Namespace, report: Report, facts: RankFacts, finding: Finding, rank: int) -> int:
    """Report the checks of a process that finds no others: on rank 0 all of them, on others one line."""
    if rank != 0:
        return _complain(rank, f"{finding.figure}\n  -> {finding.advice}")
    alone, hosts = {0: facts}, {0: str(facts["host"])}
    report.open(Header("alone", 1, (hosts[0],)))
    if finding.check != "launcher":
        report.add(launcher.judge_launcher(alone, hosts))
    report.add(finding, *(judge(alone, hosts) for judge in _JUDGES))
    probe = folder.probe_folder(options.folder, uuid.uuid4().hex[:8], 0)
    report.add(folder.judge_folder({0: probe}, hosts))
    folder.leave_folder(probe, 0)
    report.add(Finding("join", Verdict.SKIP, "the ranks cannot meet"))
    report.close()
    return 1


def _complain(rank: int, message: str) -> int:
    print(f"dengine doctor: rank {rank} on {socket.gethostname()}: {message}", file=sys.stderr, flush=True)
    return 1
