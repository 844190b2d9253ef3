"""Drawing the indices of one epoch: dengine's ElasticSampler and torch's DistributedSampler by turns.

Both shuffle; all indices of one rank are drawn, from the start of the epoch on. Printed are the medians in
milliseconds, the median of the rounds' ratios, and what the start of an epoch costs until the first index is there.
"with epochs": dengine's indices carry the epoch, as they do if the data set may draw at random.

    python benchmarks/sampler.py [--samples N] [--rounds R]
"""

import argparse
import platform
import statistics
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from dengine.distributed import ElasticSampler

BATCH = 32


def elastic(num_samples: int, num_ranks: int, carries_epoch: bool) -> Any:
    sampler = ElasticSampler(range(num_samples), batch_size=BATCH, num_replicas=num_ranks, rank=0)
    sampler.carries_epoch = carries_epoch
    return sampler


def of_torch(num_samples: int, num_ranks: int) -> Any:
    return DistributedSampler(range(num_samples), num_replicas=num_ranks, rank=0)  # type: ignore[arg-type]


def all_indices(sampler: Any, epoch: int) -> None:
    sampler.set_epoch(epoch)
    deque(sampler, maxlen=0)


def first_index(sampler: Any, epoch: int) -> None:
    sampler.set_epoch(epoch)
    next(iter(sampler))


def seconds(draw: Callable[[Any, int], None], sampler: Any, epoch: int) -> float:
    started = time.perf_counter()
    draw(sampler, epoch)
    return time.perf_counter() - started


def compare(
    what: str,
    draw: Callable[[Any, int], None],
    num_samples: int,
    num_ranks: int,
    num_rounds: int,
    carries_epoch: bool = False,
) -> None:
    samplers = [elastic(num_samples, num_ranks, carries_epoch), of_torch(num_samples, num_ranks)]
    rounds = [[seconds(draw, sampler, epoch) for sampler in samplers] for epoch in range(num_rounds)]
    ours, theirs = (1e3 * statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(mine / other for mine, other in rounds)
    print(f"{what:13s} {num_ranks:5d} ranks  dengine {ours:9.2f} ms  torch {theirs:9.2f} ms  ratio {ratio:.2f}")


def start_of(num_samples: int) -> None:
    """Set up, in the midst of an epoch, until the first index is there."""
    sampler = ElasticSampler(range(num_samples), batch_size=BATCH, num_replicas=8, rank=3)
    sampler.set_epoch(1)
    sampler.skip(num_samples // 10)
    next(iter(sampler))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.samples} samples; Python {platform.python_version()}, torch {torch.__version__}")
    for num_ranks in (1, 2, 8, 64):
        compare("all indices", all_indices, options.samples, num_ranks, options.rounds)
        compare("with epochs", all_indices, options.samples, num_ranks, options.rounds, carries_epoch=True)
    compare("first index", first_index, options.samples, 8, options.rounds)
    tracemalloc.start()
    start_of(10**9)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times = sorted(seconds(lambda sampler, epoch: start_of(10**9), None, 0) for _ in range(options.rounds))
    print(f"10^9 samples: first index after {1e3 * times[len(times) // 2]:.2f} ms, {peak_bytes / 1e6:.2f} MB at most")


if __name__ == "__main__":
    main()
