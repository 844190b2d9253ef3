"""Check that each rank has its own device, of the same kind everywhere, and not more threads than cores."""

import os
from collections import defaultdict
from pathlib import Path

import torch

from dengine.launch.env import Launch
from dengine.launch.world import default_device
from dengine.tools.doctor.facts import DeviceFacts, Facts, ThreadFacts
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["device_facts", "judge_devices", "judge_threads", "thread_facts"]


def device_facts(launch: Launch | None) -> DeviceFacts:
    """The device that this rank would use in a training. `identity` identifies the piece of hardware."""
    index = 0 if launch is None else launch.device_index
    device = default_device(index)
    facts: DeviceFacts = {"device": str(device), "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
    if device.type == "cpu":
        has_driver = Path("/dev/nvidiactl").exists() and facts["visible"] != ""
        return {**facts, "name": "CPU", "identity": None, "num_visible": 0, "has_unused_gpu": has_driver}
    num_visible = torch.cuda.device_count()
    facts |= {"num_visible": num_visible, "has_unused_gpu": False}
    if device.index is None or device.index >= num_visible:
        return {**facts, "name": "none", "identity": None, "is_missing": True}
    properties = torch.cuda.get_device_properties(device)
    return {**facts, "name": properties.name, "identity": str(getattr(properties, "uuid", device.index))}


def judge_devices(facts: Facts, hosts: dict[int, str]) -> Finding:
    reported = {rank: each["device"] for rank, each in facts.items()}
    problem = _missing(reported, hosts) or _shared(reported, hosts) or _mixed(reported, hosts)
    if problem is not None:
        return problem
    names = sorted({each["name"] for each in reported.values()})
    first = reported[min(reported)]
    unused = [rank for rank, each in reported.items() if each.get("has_unused_gpu")]
    if unused:
        return Finding(
            "devices",
            Verdict.WARN,
            f"{ranks_text(unused, hosts)} would train on the CPU, although the host has an NVIDIA driver",
            "install a CUDA build of torch that the driver is new enough for: see `nvidia-smi` and torch.version.cuda.",
            tuple(unused),
        )
    if first["identity"] is None:
        return Finding("devices", Verdict.OK, "the CPU: torch finds no GPU")
    return Finding("devices", Verdict.OK, f"one {' or '.join(names)} for each rank")


def thread_facts() -> ThreadFacts:
    try:
        cpus = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cpus = list(range(os.cpu_count() or 1))
    return {"cpus": cpus, "num_threads": torch.get_num_threads()}


def judge_threads(facts: Facts, hosts: dict[int, str]) -> Finding:
    """Whether the ranks of a host start more threads than it has cores for them."""
    worst: tuple[float, str, int, int, list[int]] = (0.0, "", 0, 0, [])
    for host in sorted({hosts[rank] for rank in facts}):
        ranks = [rank for rank in facts if hosts[rank] == host]
        num_cpus = len({cpu for rank in ranks for cpu in facts[rank]["threads"]["cpus"]})
        num_threads = sum(facts[rank]["threads"]["num_threads"] for rank in ranks)
        worst = max(worst, (num_threads / num_cpus, host, num_threads, num_cpus, ranks))
    ratio, host, num_threads, num_cpus, ranks = worst
    figure = f"{num_threads} thread{'s' * (num_threads > 1)} of torch on {num_cpus} CPU{'s' * (num_cpus > 1)} of {host}"
    if ratio > 1:
        each = max(1, num_cpus // len(ranks))
        advice = f"export OMP_NUM_THREADS={each}: ranks that wait for each other's threads are much slower."
        if num_threads == len(ranks):
            advice = "start fewer ranks on this host, or ask the scheduler for more cores (--cpus-per-task)."
        return Finding("threads", Verdict.WARN, f"{figure}: more than there are", advice, tuple(ranks))
    return Finding("threads", Verdict.OK, figure)


def _missing(reported: dict[int, DeviceFacts], hosts: dict[int, str]) -> Finding | None:
    lost = [rank for rank, each in reported.items() if each.get("is_missing")]
    if not lost:
        return None
    first = reported[lost[0]]
    return Finding(
        "devices",
        Verdict.FAIL,
        f"{ranks_text(lost, hosts)} would use {first['device']}, but only {first['num_visible']} GPUs are shown there",
        "start one process per GPU (torchrun --nproc-per-node=gpu; srun --gpus-per-task=1), and see that LOCAL_RANK "
        "counts from 0 on each host.",
        tuple(lost),
    )


def _shared(reported: dict[int, DeviceFacts], hosts: dict[int, str]) -> Finding | None:
    users: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, each in reported.items():
        if each["identity"] is not None:
            users[hosts[rank], each["identity"]].append(rank)
    crowded = {key: ranks for key, ranks in users.items() if len(ranks) > 1}
    if not crowded:
        return None
    (host, identity), ranks = min(crowded.items(), key=lambda item: item[1])
    first = reported[ranks[0]]
    return Finding(
        "devices",
        Verdict.FAIL,
        f"{ranks_text(ranks)} of {host} all use one device, {first['name']} {identity} "
        f"(CUDA_VISIBLE_DEVICES={first['visible'] or 'not set'}, each takes {first['device']})",
        "give each rank its own: unset CUDA_VISIBLE_DEVICES in the job script and start one process per GPU (torchrun "
        "--nproc-per-node=gpu sets LOCAL_RANK; srun --gpus-per-task=1). NCCL refuses two ranks on one device.",
        tuple(sorted(rank for each in crowded.values() for rank in each)),
    )


def _mixed(reported: dict[int, DeviceFacts], hosts: dict[int, str]) -> Finding | None:
    on_cpu = [rank for rank, each in reported.items() if each["device"] == "cpu"]
    if not on_cpu or len(on_cpu) == len(reported):
        return None
    return Finding(
        "devices",
        Verdict.FAIL,
        f"{ranks_text(on_cpu, hosts)} would train on the CPU, and the others on GPUs",
        "see what `nvidia-smi` says there, and that the job asks for a GPU for every rank.",
        tuple(on_cpu),
    )
