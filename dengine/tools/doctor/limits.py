"""Check the limits of each rank: open files, memory, /dev/shm, and signals that reach it."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dengine.launch.memory import host_memory_free
from dengine.tools.doctor.facts import Facts, LimitFacts, SignalFacts
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["judge_files", "judge_memory", "judge_shared_memory", "judge_signals", "limit_facts", "signal_facts"]

_FILES_OF_A_RANK = 4096  # connections to other ranks, and what loader workers and libraries open
_FILES_OF_THE_STORE = 3  # connections of each rank
_LITTLE_MEMORY = _LITTLE_SHM = 1 << 30
_NO_SHM = 16 << 20
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # those that handlers.Preemption handles
_SIGNAL_S = 1.0


def limit_facts() -> LimitFacts:
    shm: dict[str, int] | None = None
    with suppress(OSError):
        found = os.statvfs("/dev/shm")
        shm = {"total": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}
    return {
        "num_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "num_files_hard": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "address_space": resource.getrlimit(resource.RLIMIT_AS)[0],
        "memory_locked": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "has_infiniband": any(Path("/sys/class/infiniband").glob("*")),
        "memory_free": host_memory_free(),
        "shm": shm,
    }


def signal_facts() -> SignalFacts:
    """Whether Python receives the signals with which a scheduler announces the end: this process sends them to
    itself.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    unseen, slowest = [], 0.0
    for number in _SIGNALS:
        # A blocked signal would come later, and end this process.
        took = None if number in blocked else _delivered(number)
        if took is None:
            unseen.append(number.name)
        else:
            slowest = max(slowest, took)
    return {"unseen": unseen, "slowest_s": slowest, "deadly_to_agent": _deadly_to_agent()}


def judge_files(facts: Facts, hosts: dict[int, str]) -> Finding:
    """Whether each rank may open enough files, and the host of the store, on which three belong to each rank.

    The store is rank 0's or its launcher's, from which rank 0 has its limit.
    """
    limits = {rank: each["limits"]["num_files"] for rank, each in facts.items()}
    needed = {rank: _FILES_OF_A_RANK + (_FILES_OF_THE_STORE * len(facts) if rank == 0 else 0) for rank in facts}
    lowest = min(limits, key=lambda rank: _finite(limits[rank]) - needed[rank])
    if _finite(limits[lowest]) < needed[lowest]:
        hard = _finite(facts[lowest]["limits"]["num_files_hard"])
        wanted = max(65536, needed[lowest])
        advice = f"`ulimit -n {min(wanted, hard)}` before the launch; in a container, --ulimit nofile={wanted}."
        if hard < needed[lowest]:
            advice += f" More than {hard} takes an administrator (LimitNOFILE= of the service that starts the ranks)."
        what = f"the store of {len(facts)} ranks" if lowest == 0 else "loader workers and many ranks"
        return Finding(
            "open files",
            Verdict.WARN,
            f"{ranks_text([lowest], hosts)} may open {limits[lowest]} files: few for {what}, which take up to "
            f"{needed[lowest]}",
            advice,
            (lowest,),
        )
    return Finding("open files", Verdict.OK, f"{_number(limits[lowest])} at once, of at most {needed[lowest]} needed")


def judge_memory(facts: Facts, hosts: dict[int, str]) -> Finding:
    """Whether the host with the least memory for each of its ranks has enough."""
    per_rank = {}
    for rank, each in facts.items():
        num_ranks = sum(hosts[other] == hosts[rank] for other in facts)
        per_rank[rank] = min(each["limits"]["memory_free"] // num_ranks, _finite(each["limits"]["address_space"]))
    least = min(per_rank, key=lambda rank: per_rank[rank])
    figure = f"{_size(per_rank[least])} free for each rank of {hosts[least]}"
    if per_rank[least] < _LITTLE_MEMORY:
        advice = "start fewer ranks per host, ask the scheduler for more memory (--mem), or raise `ulimit -v`."
        return Finding("memory", Verdict.WARN, figure, advice, (least,))
    unlocked = [rank for rank, each in facts.items() if _cannot_lock(each["limits"])]
    if unlocked:
        return Finding(
            "memory",
            Verdict.WARN,
            f"{ranks_text(unlocked, hosts)} may lock only {_size(facts[unlocked[0]]['limits']['memory_locked'])}",
            "InfiniBand needs `ulimit -l unlimited` in the service that starts the ranks (slurmd, the container).",
            tuple(unlocked),
        )
    return Finding("memory", Verdict.OK, figure)


def judge_shared_memory(facts: Facts, hosts: dict[int, str]) -> Finding:
    reported = {rank: each["limits"]["shm"] for rank, each in facts.items()}
    lost = [rank for rank, shm in reported.items() if shm is None or shm["free"] < _NO_SHM]
    advice = "enlarge it: docker run --shm-size=16g (or --ipc=host), `mount -o remount,size=16G /dev/shm`; else remove "
    advice += "what is left over there. Loader workers hand batches over in it, and NCCL talks through it."
    if lost:
        shm = reported[lost[0]]
        figure = "is not there" if shm is None else f"has {_size(shm['free'])} left of {_size(shm['total'])}"
        return Finding("/dev/shm", Verdict.FAIL, f"{figure} on {ranks_text(lost, hosts)}", advice, tuple(lost))
    free, total, least = min((shm["free"], shm["total"], rank) for rank, shm in reported.items() if shm is not None)
    figure = f"{_size(free)} free of {_size(total)} on {hosts[least]}"
    if free < _LITTLE_SHM:
        return Finding("/dev/shm", Verdict.WARN, figure, advice, (least,))
    return Finding("/dev/shm", Verdict.OK, figure)


def judge_signals(facts: Facts, hosts: dict[int, str]) -> Finding:
    reported = {rank: each["signals"] for rank, each in facts.items()}
    deaf = [rank for rank, each in reported.items() if each["unseen"]]
    if deaf:
        return Finding(
            "signals",
            Verdict.FAIL,
            f"{', '.join(reported[deaf[0]]['unseen'])} does not reach {ranks_text(deaf, hosts)}: it is blocked there",
            "a job could not save when it is preempted: start the ranks from a shell or launcher that does not block "
            "signals (`grep SigBlk /proc/self/status` is all zeros).",
            tuple(deaf),
        )
    deadly = {rank: each["deadly_to_agent"] for rank, each in reported.items() if each["deadly_to_agent"]}
    if deadly:
        names = ", ".join(deadly[min(deadly)])
        return Finding(
            "signals",
            Verdict.WARN,
            f"ranks see them, but {names} would kill torchrun itself, and leave its ranks behind",
            "torchrun --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout=120",
            tuple(deadly),
        )
    slowest = max(each["slowest_s"] for each in reported.values())
    names = ", ".join(number.name for number in _SIGNALS)
    return Finding("signals", Verdict.OK, f"{names} seen within {1000 * slowest:.2f} ms")


def _delivered(number: signal.Signals) -> float | None:
    """The seconds until the handler ran; None if it never did."""
    seen: list[float] = []
    with _handled(number, seen):
        began = time.monotonic()
        os.kill(os.getpid(), number)
        while not seen and time.monotonic() < began + _SIGNAL_S:
            time.sleep(0.001)
    return seen[0] - began if seen else None


@contextmanager
def _handled(number: signal.Signals, seen: list[float]) -> Iterator[None]:
    previous = signal.signal(number, lambda *_: seen.append(time.monotonic()))
    try:
        yield
    finally:
        signal.signal(number, previous if previous is not None else signal.SIG_DFL)


def _deadly_to_agent() -> list[str]:
    """The signals that torchrun, the parent of this process, neither handles nor ignores."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    masks = {}
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{os.getppid()}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("SigIgn", "SigCgt"):
                masks[name] = int(value, 16)
    survived = masks.get("SigIgn", 0) | masks.get("SigCgt", 0)
    return [number.name for number in _SIGNALS if masks and not survived >> (number - 1) & 1]


def _cannot_lock(limits: LimitFacts) -> bool:
    return bool(limits["has_infiniband"]) and limits["memory_locked"] != resource.RLIM_INFINITY


def _finite(limit: int) -> int:
    return 1 << 62 if limit == resource.RLIM_INFINITY else limit


def _number(limit: int) -> str:
    return "no limit" if limit == resource.RLIM_INFINITY else str(limit)


def _size(num_bytes: int) -> str:
    return (
        "no limit"
        if num_bytes < 0
        else f"{num_bytes / 1e9:.1f} GB"
        if num_bytes >= 1e9
        else f"{num_bytes / 1e6:.0f} MB"
    )
