"""Check which launcher was chosen, which ranks came, and that variables do not contradict each other."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

from dengine.errors import LaunchError
from dengine.launch.env import Choice
from dengine.launch.slurm import host_names
from dengine.tools.doctor.exchange import Exchange
from dengine.tools.doctor.facts import Facts, LaunchFacts
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["claimed_rank", "half_set", "judge_came", "judge_launcher", "judge_variables", "launch_facts"]

_TUNING = ("GLOO_", "NCCL_", "TORCH_NCCL_")
_RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launch_facts(choice: Choice, env: Mapping[str, str]) -> LaunchFacts:
    """The facts in this rank's environment variables. Pure."""
    nodes = env.get("SLURM_STEP_NODELIST", "") if choice.launch is not None else ""
    hosts: list[str] = []
    with suppress(LaunchError):
        hosts = host_names(nodes) if nodes else []
    return {
        "launcher": "single" if choice.launch is None else choice.launch.launcher,
        "reason": choice.reason,
        "conflict": _conflict(choice, env),
        "node": env.get("SLURMD_NODENAME", ""),
        "step_hosts": hosts,
        "tuning": {name: value for name, value in env.items() if name.startswith(_TUNING)},
    }


def judge_launcher(facts: Facts, hosts: dict[int, str]) -> Finding:
    reported = {rank: each["launch"] for rank, each in facts.items()}
    conflicts = {rank: each["conflict"] for rank, each in reported.items() if each["conflict"]}
    if conflicts:
        first = min(conflicts)
        message, advice = conflicts[first]
        return Finding("launcher", Verdict.FAIL, f"{ranks_text([first], hosts)}: {message}", advice, tuple(conflicts))
    reason = reported[min(reported)]["reason"]
    return Finding("launcher", Verdict.OK, reason)


def judge_came(facts: Facts, exchange: Exchange, wait_s: float, hosts: dict[int, str]) -> Finding:
    """Whether every rank has come, and only once."""
    size = exchange.size
    twice = [exchange.wait(key, 1.0) for rank in range(size) if exchange.is_there(key := f"twice/{rank}")]
    if twice:
        return Finding(
            "ranks",
            Verdict.FAIL,
            f"a second process takes itself for {'; '.join(twice)}",
            "give each process a RANK of its own, or let torchrun or srun start them.",
        )
    missing = sorted(set(range(size)) - facts.keys())
    if not missing:
        return Finding("ranks", Verdict.OK, f"{size} of {size} came")
    expected: list[str] = next(
        (each["launch"]["step_hosts"] for each in facts.values() if each["launch"]["step_hosts"]), []
    )
    silent = sorted(set(expected) - {each["launch"]["node"] for each in facts.values()})
    where = f"; nobody at all from {', '.join(silent)}" if silent else ""
    return Finding(
        "ranks",
        Verdict.FAIL,
        f"{ranks_text(missing)} never came: {len(facts)} of {size} are here after {wait_s:g} s{where}",
        "look at what these ranks printed themselves; else see that they were started, that their hosts reach the "
        "master, and that WORLD_SIZE is right. A slow start may need a longer --wait.",
        tuple(missing),
    )


def judge_variables(facts: Facts, hosts: dict[int, str]) -> Finding:
    """Whether the ranks have the same settings for Gloo and NCCL."""
    reported = {rank: each["launch"]["tuning"] for rank, each in facts.items()}
    names = sorted({name for each in reported.values() for name in each})
    for name in names:
        values = {rank: each.get(name) for rank, each in reported.items()}
        common = Counter(values.values()).most_common(1)[0][0]
        odd = [rank for rank, value in values.items() if value != common]
        if odd:
            theirs = values[odd[0]]
            return Finding(
                "variables",
                Verdict.WARN,
                f"{name} is {_shown(theirs)} on {ranks_text(odd, hosts)}, and {_shown(common)} on the others",
                "set it alike on all hosts, unless they differ in hardware: srun exports the environment of the shell "
                "it is called from, torchrun that of each host.",
                tuple(odd),
            )
    return Finding("variables", Verdict.OK, f"{', '.join(names) or 'none'} set for Gloo and NCCL")


def half_set(error: LaunchError) -> Finding:
    message, _, advice = str(error).partition(". ")
    return Finding(
        "launcher", Verdict.FAIL, message.rstrip("."), advice or "see the launcher's variables: `env | sort`."
    )


def claimed_rank(env: Mapping[str, str]) -> int:
    """The rank in a process's variables, even if they are incomplete; 0 if there is none."""
    found = (env.get(name, "") for name in _RANK_NAMES)
    return next((int(text) for text in found if text.isdigit()), 0)


def _conflict(choice: Choice, env: Mapping[str, str]) -> tuple[str, str] | None:
    """The message and the advice if variables of two launchers contradict each other; else None."""
    tasks, world = env.get("SLURM_STEP_NUM_TASKS", ""), env.get("WORLD_SIZE", "")
    if tasks.isdigit() and world.isdigit() and int(world) < int(tasks):
        return (
            f"srun started {tasks} tasks, but WORLD_SIZE={world} is set too and wins: several tasks would be the same "
            "rank, or train alone",
            "unset RANK and WORLD_SIZE in the job script, so that srun's variables are used, or give the step one task "
            "per node (--ntasks-per-node=1) and start torchrun in it.",
        )
    size = env.get("OMPI_COMM_WORLD_SIZE") or env.get("PMI_SIZE", "")
    if choice.launch is None and size.isdigit() and int(size) > 1:
        return (
            f"mpirun started {size} processes, whose variables are not read: each would train alone",
            "start them by torchrun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from mpirun's.",
        )
    return None


def _shown(value: str | None) -> str:
    return "not set" if value is None else repr(value)
