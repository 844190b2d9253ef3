"""What the control plane costs a training loop: 2 ranks, DDP, a step of about 1 ms, with it and without it.

Without it the same engine runs the same step in a process group that torch made and dengine knows nothing of. The two
take turns within one run, in a group of their own each time; the median of the ratios of neighbours counts.

    python benchmarks/control.py [--rounds R] [--iterations N] [--ranks 2]
"""

import argparse
import os
import platform
import socket
import statistics
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


def measured(iterations: int, work: torch.Tensor) -> dict[str, float]:
    """Seconds of wall-clock time, and of this process's CPU time, an iteration."""
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    batch = torch.randn(8, 64)

    def step(engine: Engine, _: Any) -> None:
        torch.mm(work, work)
        model(batch).sum().backward()

    trainer = Engine(step)
    trainer.run(range(50))
    dist.barrier()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    trainer.run(range(iterations))
    return {
        "wall": (time.perf_counter() - wall_s) / iterations,
        "cpu": (time.process_time() - cpu_s) / iterations,
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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--iterations", type=int, default=1500)
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
    for what in ("wall", "cpu"):
        ratios = [one[what] / other[what] for one, other in zip(taken["with"], taken["without"], strict=True)]
        middle = {name: 1e6 * statistics.median(one[what] for one in rows) for name, rows in taken.items()}
        low, high = min(ratios), max(ratios)
        print(
            f"{what:5} {middle['without']:7.0f} us an iteration without, {middle['with']:7.0f} us with: "
            f"{100 * (statistics.median(ratios) - 1):+.2f} % (of single pairs {100 * (low - 1):+.1f} to "
            f"{100 * (high - 1):+.1f} %)"
        )


if __name__ == "__main__":
    main()
