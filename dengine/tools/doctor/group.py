"""Make a process group as a training does, reduce over it in each backend, and save and load a checkpoint."""

import re
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dengine import checkpoint, distributed
from dengine.tools.doctor.facts import GroupFacts
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["LIMIT_S", "exercise", "is_hanging", "judge_group"]

LIMIT_S = 30.0  # for all steps together
_JOIN_S = 15.0
_THREAD = "dengine-doctor-group"
_NO_ANSWER = "no answer"
_SIZES = {4: 20, 64 << 10: 10, 1 << 20: 5, 16 << 20: 3}  # bytes -> number of repetitions
_PING_BYTES = 256 << 10
_NUM_PINGS = 3
_MANY_RANKS = 64
_SLOW_RATIO, _SLOW_S = 4.0, 0.005
_PERIOD = 251  # period of the values that are added up: their sums are exact in float32


def exercise(backend: str, part: Path, *, mesh: dict[str, int] | None = None) -> GroupFacts:
    """Try everything that needs a process group; errors and hangs are in the result, and are not raised.

    `backend` and `mesh` are as for `process_group()`; a checkpoint is saved in the folder `part`.
    Collective: call on all ranks. Cost: `LIMIT_S` at most. A step that hangs then stays in its thread.
    """
    results: GroupFacts = {}
    # Gloo's wait for a peer that cannot reach this host does not end at the group's timeout.
    thread = threading.Thread(target=_exercise, args=(backend, part, mesh, results), name=_THREAD, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    if thread.is_alive():
        return {**results, "failed": {"step": _step(results), "error": f"{_NO_ANSWER} after {LIMIT_S:g} s"}}
    return results


def is_hanging() -> bool:
    """Whether the thread still waits, in C++, and would keep the interpreter from ending."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def judge_group(facts: dict[int, GroupFacts], hosts: dict[int, str]) -> list[Finding]:
    found = [_judge_join(facts, hosts), *(_judge_reduction(each, facts, hosts) for each in ("gloo", "nccl"))]
    return [*(each for each in found if each is not None), _judge_checkpoint(facts, hosts)]


# -- on each rank ------------------------------------------------------------------------------------------------


def _exercise(backend: str, part: Path, mesh: dict[str, int] | None, results: GroupFacts) -> None:
    began = time.monotonic()
    try:
        with distributed.process_group(backend, timeout=_JOIN_S, mesh=mesh) as world:
            results["join"] = {"seconds": time.monotonic() - began, "backend": world.backend}
            if dist.is_initialized():
                reduced = {"gloo": _reduced(torch.device("cpu"))}
                if "nccl" in world.backend:
                    reduced["nccl"] = _reduced(world.device)
                results["reduced"] = reduced
                results["pings"] = _pings(world.rank, world.size)
            results["checkpoint"] = _round_trip(part / "doctor_1.pt")
    except Exception as error:
        results["failed"] = {"step": _step(results), "error": f"{type(error).__name__}: {_headline(error)}"}


def _headline(error: Exception) -> str:
    """The first line of the message, without the line of torch's sources that raised it."""
    lines = str(error).splitlines() or [""]
    return re.sub(r"\[/[^\]\s]*:\d+\] ", "", lines[0])


def _step(results: GroupFacts) -> str:
    """The step that was under way: the first one without a result."""
    if "join" in results and results["join"]["backend"] == "none":
        return "checkpoint"
    return next((name for name in ("join", "reduced", "pings", "checkpoint") if name not in results), "leave")


def _reduced(device: torch.device) -> list[dict[str, Any]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for num_bytes, times in _SIZES.items():
        base = torch.arange(num_bytes // 4, device=device) % _PERIOD
        mine, expected = (base + rank).float(), (size * base + size * (size - 1) // 2).float()
        took, is_right = [], True
        for _ in range(times + 1):
            value = mine.clone()
            took.append(_timed(lambda value=value: dist.all_reduce(value), device))  # type: ignore[misc]
            is_right = is_right and torch.equal(value, expected)
        # The first also connects.
        results.append({"bytes": num_bytes, "seconds": statistics.median(took[1:]), "is_right": is_right})
    return results


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _pings(rank: int, size: int) -> dict[int, float]:
    """On rank 0, the seconds for 256 kB to each rank and back, one by one, so that a slow rank slows no others."""
    value = torch.zeros(_PING_BYTES // 4)
    times: dict[int, float] = {}
    for other in range(1, min(size, _MANY_RANKS)):
        for _ in range(_NUM_PINGS + 1 if rank in (0, other) else 0):
            began = time.perf_counter()
            if rank == 0:
                dist.send(value, other)
                dist.recv(value, other)
                times[other] = min(times.get(other, 1e9), time.perf_counter() - began)
            else:
                dist.recv(value, 0)
                dist.send(value, 0)
    return times


def _round_trip(path: Path) -> dict[str, Any]:
    saved, loaded = nn.Linear(512, 512), nn.Linear(512, 512)
    with torch.no_grad():
        saved.weight.copy_(torch.arange(512 * 512).reshape(512, 512))
        saved.bias.zero_()
    took: dict[str, Any] = {}
    actions: dict[str, Callable[[], object]] = {
        "save_s": lambda: checkpoint.save(path, {"model": saved}),
        "verify_s": lambda: checkpoint.verify(path),
        "load_s": lambda: checkpoint.load(path, {"model": loaded}),
    }
    for name, action in actions.items():
        began = time.monotonic()
        action()
        took[name] = time.monotonic() - began
    took["is_equal"] = all(torch.equal(*pair) for pair in zip(saved.parameters(), loaded.parameters(), strict=True))
    return took


# -- judged ------------------------------------------------------------------------------------------------------


def _judge_join(facts: dict[int, GroupFacts], hosts: dict[int, str]) -> Finding:
    failed = _failed(facts, {"join"})
    if failed:
        first = _most_telling(failed)
        return Finding(
            "join",
            Verdict.FAIL,
            f"no process group: {ranks_text(failed, hosts)} failed, {ranks_text([first])} with {failed[first]}",
            "the ranks reach the master, but not each other: see the line on interfaces (GLOO_SOCKET_IFNAME), and "
            "open the ports that hosts choose for each other (32768 and up); with GPUs try NCCL_DEBUG=INFO.",
            tuple(failed),
        )
    slowest = max(each["join"]["seconds"] for each in facts.values())
    backend = facts[min(facts)]["join"]["backend"]
    if backend == "none":
        return Finding("join", Verdict.SKIP, "one process makes no process group")
    return Finding("join", Verdict.OK, f"process group over {backend} made in {slowest:.2f} s")


def _judge_reduction(backend: str, facts: dict[int, GroupFacts], hosts: dict[int, str]) -> Finding | None:
    """The finding about all-reduces over `backend`: right sums first, then speed; None if no rank tried it."""
    results = {rank: each["reduced"][backend] for rank, each in facts.items() if backend in each.get("reduced", {})}
    failed = _failed(facts, {"reduced", "pings"})
    if failed and not results:
        first = _most_telling(failed)
        return Finding(
            backend,
            Verdict.FAIL,
            f"{ranks_text(failed, hosts)} could not reduce: {failed[first]}",
            "a firewall may pass small messages only (MTU), or a host is overloaded; with NCCL try NCCL_DEBUG=INFO.",
            tuple(failed),
        )
    if not results:
        return None
    wrong = sorted(rank for rank, sizes in results.items() if any(not each["is_right"] for each in sizes))
    if wrong:
        return Finding(
            backend,
            Verdict.FAIL,
            f"wrong sums on {ranks_text(wrong, hosts)}",
            "the hardware or its driver is at fault: leave that host out, and test its memory and network card.",
            tuple(wrong),
        )
    return _speed(backend, results, _pinged(facts) if backend == "gloo" else {}, hosts)


def _judge_checkpoint(facts: dict[int, GroupFacts], hosts: dict[int, str]) -> Finding:
    failed = _failed(facts, {"checkpoint"})
    if failed:
        first = _most_telling(failed)
        advice = "see the lines on the folder above; if they are fine, a training would fail with this message."
        return Finding("checkpoint", Verdict.FAIL, f"{failed[first]}", advice, tuple(failed))
    results = {rank: each["checkpoint"] for rank, each in facts.items() if "checkpoint" in each}
    if not results:
        return Finding("checkpoint", Verdict.SKIP, "without a process group nothing is saved together")
    wrong = [rank for rank, each in results.items() if not each["is_equal"]]
    if wrong:
        figure = f"what {ranks_text(wrong, hosts)} loaded is not what was saved"
        advice = "the file system does not give back the bytes that were written: pass another folder by --folder."
        return Finding("checkpoint", Verdict.FAIL, figure, advice, tuple(wrong))
    slowest = {name: max(each[name] for each in results.values()) for name in ("save_s", "verify_s", "load_s")}
    parts = ", ".join(f"{name.removesuffix('_s')} {1000 * seconds:.0f} ms" for name, seconds in slowest.items())
    return Finding("checkpoint", Verdict.OK, f"1 MB there and back: {parts}", data=slowest)


def _failed(facts: dict[int, GroupFacts], steps: set[str]) -> dict[int, str]:
    """The ranks that failed in one of `steps`, with their errors: if any failed by itself, only those that did."""
    failed = {rank: each["failed"] for rank, each in facts.items() if each.get("failed", {}).get("step") in steps}
    own = {rank: each["error"] for rank, each in failed.items() if not each["error"].startswith("RemoteRankError")}
    return own or {rank: each["error"] for rank, each in failed.items()}


def _most_telling(failed: dict[int, str]) -> int:
    """The rank with the most useful error: that of a rank that only waited says little."""
    return min(failed, key=lambda rank: (failed[rank].startswith(_NO_ANSWER), rank))


def _pinged(facts: dict[int, GroupFacts]) -> dict[int, float]:
    # JSON has turned the ranks into text.
    return {int(rank): seconds for rank, seconds in facts.get(0, {}).get("pings", {}).items()}


def _speed(
    backend: str, results: dict[int, list[dict[str, Any]]], pings: dict[int, float], hosts: dict[int, str]
) -> Finding:
    num_ranks = len(results)
    seconds = {size: [sizes[index]["seconds"] for sizes in results.values()] for index, size in enumerate(_SIZES)}
    latency, largest = max(seconds[min(_SIZES)]), max(_SIZES)
    rate = largest / max(seconds[largest]) / 1e9
    figure = f"right sums; 4 B {1e3 * latency:.2f} ms, 1 MB {1e3 * max(seconds[1 << 20]):.2f} ms, "
    figure += f"16 MB {1e3 * max(seconds[largest]):.1f} ms = {rate:.2f} GB/s"
    data: dict[str, Any] = {
        "num_ranks": num_ranks,
        "seconds": {rank: {each["bytes"]: each["seconds"] for each in sizes} for rank, sizes in results.items()},
        "ping_s": pings,
    }
    if num_ranks == 1:
        return Finding(backend, Verdict.OK, figure, data=data)
    if not pings:
        slowest = max(results, key=lambda rank: results[rank][-1]["seconds"])
        return Finding(backend, Verdict.OK, f"{figure}; slowest {ranks_text([slowest], hosts)}", data=data)
    slowest = max(pings, key=lambda rank: pings[rank])
    median = statistics.median(pings.values())
    figure += f"; slowest {ranks_text([slowest], hosts)}, 256 kB there and back {1e3 * pings[slowest]:.1f} ms"
    if len(pings) > 1 and pings[slowest] > max(_SLOW_RATIO * median, median + _SLOW_S):
        return Finding(
            backend,
            Verdict.WARN,
            f"{figure} (others {1e3 * median:.1f} ms)",
            "all ranks wait for the slowest: look at that host's network card, cable and load, or leave it out.",
            (slowest,),
            data,
        )
    return Finding(backend, Verdict.OK, figure, data=data)
