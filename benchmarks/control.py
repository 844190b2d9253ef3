"""What the control plane costs a training loop: 2 ranks, DDP, a step of about 1 ms, with it and without it.

Two measurements, since a shared machine's noise is larger than what is looked for:

- What its threads take of the CPU, from the kernel's own count, as a share of the time that the loop ran meanwhile.
  Nothing else of the control plane costs anything while all goes well, and other work on the machine does not blur it.
- The same engine with the same step in a process group that torch made and dengine knows nothing of. The two take turns
  in short blocks, in a group of their own each time; of each block the median iteration and the mean count, of all
  neighbours the median ratio, with the interval that holds it in 95 % of the resampled rounds.

    python benchmarks/control.py [--rounds R] [--iterations N] [--ranks 2]
"""

import argparse
import itertools
import os
import platform
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from dengine import Engine, distributed

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def with_control(rank: int, size: int, port: int) -> Iterator[None]:
    values = (rank, size, rank, size, "127.0.0.1", port)
    os.environ |= {name: str(value) for name, value in zip(LAUNCHER, values, strict=True)}
    try:
        with distributed.process_group():
            yield
    finally:
        for name in LAUNCHER:
            del os.environ[name]


@contextmanager
def without_control(rank: int, size: int, port: int) -> Iterator[None]:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    yield
    dist.barrier()
    dist.destroy_process_group()


def thread_s() -> float:
    """CPU time that the threads of the control plane have taken so far, in seconds."""
    total_ns = 0
    for thread in threading.enumerate():
        if thread.name.startswith("dengine-"):
            with open(f"/proc/self/task/{thread.native_id}/schedstat") as file:
                total_ns += int(file.read().split()[0])
    return total_ns / 1e9


def measured(iterations: int, work: torch.Tensor) -> dict[str, float]:
    """Seconds an iteration (its mean, its median), and what the threads took of the time."""
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    batch = torch.randn(8, 64)
    stamps: list[float] = []

    def step(engine: Engine, _: Any) -> None:
        stamps.append(time.perf_counter())
        torch.mm(work, work)
        model(batch).sum().backward()

    trainer = Engine(step)
    trainer.run(range(50))
    dist.barrier()
    stamps.clear()
    began_s, threads_s = time.perf_counter(), thread_s()
    trainer.run(range(iterations))
    took_s = time.perf_counter() - began_s
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    return {
        "mean": took_s / iterations,
        "median": statistics.median(steps),
        "threads": (thread_s() - threads_s) / took_s,
    }


def take_turns(rank: int, size: int, ports: list[int], rounds: int, iterations: int, answers: Any) -> None:
    torch.set_num_threads(1)
    work = torch.randn(220, 220)
    taken: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    for number in range(rounds):
        kinds = [("with", with_control), ("without", without_control)]
        for place, (name, group) in enumerate(kinds if number % 2 else kinds[::-1]):
            with group(rank, size, ports[2 * number + place]):
                taken[name].append(measured(iterations, work))
    if rank == 0:
        answers.put(taken)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    answers: Any = multiprocessing.get_context("spawn").SimpleQueue()
    context = multiprocessing.start_processes(
        take_turns,
        (options.ranks, free_ports(2 * options.rounds), options.rounds, options.iterations, answers),
        nprocs=options.ranks,
        join=False,
    )
    taken = answers.get()
    context.join()
    print(f"{platform.machine()}, torch {torch.__version__}, {options.ranks} ranks, {options.rounds} rounds")
    shares = [row["threads"] for row in taken["with"]]
    print(
        f"threads  {100 * statistics.mean(shares):.3f} % of the time of a rank "
        f"(most in one block: {100 * max(shares):.3f} %)"
    )
    for what in ("median", "mean"):
        ratios = [one[what] / other[what] for one, other in zip(taken["with"], taken["without"], strict=True)]
        middle = {name: 1e6 * statistics.median(one[what] for one in rows) for name, rows in taken.items()}
        low, high = interval(ratios)
        print(
            f"{what:8} {middle['without']:5.0f} us an iteration without, {middle['with']:5.0f} us with: "
            f"{100 * (statistics.median(ratios) - 1):+.2f} % ({100 * (low - 1):+.2f} to {100 * (high - 1):+.2f} %)"
        )


def interval(ratios: list[float]) -> tuple[float, float]:
    """Where the median lies in 95 % of the resampled rounds."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


if __name__ == "__main__":
    main()
