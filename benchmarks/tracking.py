"""What a row costs: `run.log` next to the bare encoding and writing of the same row, and next to the backends.

Each contestant logs two numbers many times; all take turns within one process, and the best round of each counts.

    python benchmarks/tracking.py [--rows N] [--rounds R] [--backends tensorboard ...]
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dengine.tracking import Track


def bare(folder: Path, num_rows: int) -> float:
    """JSON and one write a row, so that it is with the operating system as well."""
    descriptor = os.open(folder / f"bare-{time.monotonic_ns()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    started_s = time.perf_counter()
    for step in range(num_rows):
        row = {"step": step, "time": time.time(), "train/loss": 0.5 * step, "train/acc": 0.25}
        os.write(descriptor, json.dumps(row).encode() + b"\n")
    elapsed_s = time.perf_counter() - started_s
    os.close(descriptor)
    return elapsed_s


def buffered(folder: Path, num_rows: int) -> float:
    """JSON into a buffered file, which is written every few kilobytes: a killed process loses what is in the buffer."""
    with open(folder / f"buffered-{time.monotonic_ns()}.jsonl", "w") as file:
        started_s = time.perf_counter()
        for step in range(num_rows):
            row = {"step": step, "time": time.time(), "train/loss": 0.5 * step, "train/acc": 0.25}
            file.write(json.dumps(row) + "\n")
        return time.perf_counter() - started_s


def tracked(value: Callable[[float], object] = float, backend: str = "") -> Callable[[Path, int], float]:
    def measure(folder: Path, num_rows: int) -> float:
        with Track.run("benchmark", dir=folder, backend=backend or ()) as run:
            started_s = time.perf_counter()
            for step in range(num_rows):
                run.log({"train/loss": value(0.5 * step), "train/acc": 0.25}, step=step)
            return time.perf_counter() - started_s

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backends", nargs="*", default=[])
    options = parser.parse_args()
    Track.set_mode("offline")
    contestants = {
        "bare JSON and write": bare,
        "bare JSON, buffered": buffered,
        "run.log": tracked(),
        "run.log, a tensor": tracked(torch.tensor),
        **{f"run.log, {name}": tracked(backend=name) for name in options.backends},
    }
    best_s = dict.fromkeys(contestants, float("inf"))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for _ in range(options.rounds):
            for name, measure in contestants.items():
                best_s[name] = min(best_s[name], measure(Path(folder), options.rows))
    print(
        f"{options.rows} rows, best of {options.rounds}; Python {platform.python_version()}, torch {torch.__version__}"
    )
    for name, seconds in best_s.items():
        print(
            f"{name:24} {seconds / options.rows * 1e6:8.1f} us a row   {seconds / best_s['bare JSON and write']:6.2f} x"
        )


if __name__ == "__main__":
    main()
