"""What loaders cost: samples a second, and the time to the first batch at the start and at a position far inside.

Contestants take turns, round after round in one process; the medians count, and the ratios to the plain `DataLoader`
of the same round. "stateful" is torchdata's `StatefulDataLoader`, with and without prepare_data_loader(); "stream" an
iterable data set; "packed" pack_sequences() over documents of 500 tokens; "mosaic" MosaicML's StreamingDataset over
files. Those that are not installed are left out. The data are tensors in memory ("tensors": nothing is drawn at random,
so nothing is seeded) and a data set that works for a while on each sample ("work": as decoding does).

Positions: the loader is made, brought to the position by its own means (skip, or a state that was saved there), and
gives a batch. 10^9 is simulated: a data set that says it is as long, and for "packed" a state with that position.
Loaders that would have to draw all before are left out there ("-").

    python benchmarks/data.py [--samples N] [--rounds R] [--workers W ...] [--positions P ...]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dengine.data import pack_sequences
from dengine.distributed import prepare_data_loader

BATCH, WIDTH = 32, 64
DOCUMENT = np.arange(500)
MOST_DRAWN = 2_000_000  # samples that a loader may draw and drop to come to a position


class Work(Dataset[torch.Tensor]):
    """Works on each sample for about as long as a small image takes to decode."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.noise = np.random.default_rng(0).random(40_000)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.sort(self.noise)[:WIDTH] + index)


class Numbers(Dataset[torch.Tensor]):
    """As many samples as it says, of which none is stored."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Documents(Numbers):
    def __getitem__(self, index: int) -> Any:
        return DOCUMENT


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.zeros(self.size, WIDTH))


def loaders(size: int, num_workers: int, mosaic: Path | None) -> dict[str, DataLoader[Any]]:
    """The contestants; each name begins with the data that it goes through."""
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": num_workers}
    tensors, work = TensorDataset(torch.zeros(size, WIDTH)), Work(size // 50)
    found: dict[str, DataLoader[Any]] = {}
    for data, dataset in (("tensors", tensors), ("work", work)):
        found[f"{data}, plain"] = DataLoader(dataset, shuffle=True, **options)
        found[f"{data}, prepared"] = prepare_data_loader(DataLoader(dataset, shuffle=True, **options))
        if find_spec("torchdata") is not None:
            from torchdata.stateful_dataloader import StatefulDataLoader

            found[f"{data}, stateful"] = StatefulDataLoader(dataset, shuffle=True, **options)
            loader = StatefulDataLoader(dataset, shuffle=True, **options)
            found[f"{data}, stateful prepared"] = prepare_data_loader(loader)
    # More than one worker would each read all of a stream.
    options["num_workers"] = min(1, num_workers)
    found["stream, plain"] = DataLoader(Stream(size), **options)
    found["stream, prepared"] = prepare_data_loader(DataLoader(Stream(size), **options))
    options["num_workers"] = num_workers
    packed = pack_sequences(Documents(size * WIDTH // 500), WIDTH)
    found["packed, plain"] = DataLoader(packed, **options)
    found["packed, prepared"] = prepare_data_loader(DataLoader(packed, **options))
    if mosaic is not None:
        from streaming import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(local=str(mosaic), shuffle=True, batch_size=BATCH)
        found["mosaic, plain"] = StreamingDataLoader(dataset, **options)
    return found


def seconds_a_sample(loader: DataLoader[Any], size: int) -> float:
    """Of the processor without workers, which does not depend on what else it does; by the clock with workers."""
    clock = time.perf_counter if loader.num_workers else time.process_time
    started = clock()
    deque(loader, maxlen=0)
    return (clock() - started) / size


def throughput(num_samples: int, num_workers: int, num_rounds: int, mosaic: Path | None) -> dict[str, dict[str, float]]:
    contestants = loaders(num_samples, num_workers, mosaic)
    sizes = {name: num_samples // 50 if name.startswith("work") else num_samples for name in contestants}
    rounds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(num_rounds + 1):
        order = list(contestants) if number % 2 else list(reversed(contestants))
        for name in order:
            spent = seconds_a_sample(contestants[name], sizes[name])
            if number:  # the first one warms up
                rounds[name].append(spent)
    found = {}
    for name, times in rounds.items():
        plain = rounds[f"{name.partition(',')[0]}, plain"]
        ratio = statistics.median(mine / other for mine, other in zip(times, plain, strict=True))
        found[name] = {"samples_per_s": 1 / statistics.median(times), "times_plain": ratio}
    return found


def prepared_at(position: int, size: int) -> None:
    loader: Any = prepare_data_loader(DataLoader(Numbers(size), batch_size=BATCH, shuffle=True))
    loader.sampler.skip(position)
    next(iter(loader))


def packed_at(position: int, size: int) -> None:
    documents = Documents(size)
    packed = pack_sequences(documents, len(DOCUMENT), shuffle=True)
    state = packed.state_dict()
    before = DOCUMENT[-8:].tolist()
    if position:
        state |= {"documents": position, "pieces": position, "offset": len(DOCUMENT), "before": before}
    packed.load_state_dict(state)
    next(iter(DataLoader(packed, batch_size=BATCH)))


def drawn_at(position: int, size: int) -> None:
    """What a plain loader has to do."""
    batches = iter(DataLoader(Numbers(size), batch_size=BATCH, shuffle=True))
    for _ in range(position // BATCH + 1):
        next(batches)


def stateful_at(position: int, size: int) -> Callable[[], None]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    first = StatefulDataLoader(Numbers(size), batch_size=BATCH, shuffle=True)
    batches = iter(first)
    for _ in range(max(1, position // BATCH)):
        next(batches)
    state = first.state_dict()

    def resume() -> None:
        loader = StatefulDataLoader(Numbers(size), batch_size=BATCH, shuffle=True)
        loader.load_state_dict(state)
        next(iter(loader))

    return resume


def mosaic_at(position: int, folder: Path) -> None:
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(dataset, batch_size=BATCH)
    loader.load_state_dict(dataset.state_dict(position, from_beginning=True))
    next(iter(loader))


def starts(position: int, num_rounds: int, mosaic: tuple[Path, int] | None) -> dict[str, float | None]:
    """Milliseconds to the first batch after `position`, in a set of twice as many samples; None: too long to wait."""
    size = max(10_000, 2 * position)
    contestants: dict[str, Callable[[], None] | None] = {
        "prepared": lambda: prepared_at(position, size),
        "packed": lambda: packed_at(position, size),
        "plain, drawn and dropped": None,
        "stateful": None,
        "mosaic": None,
    }
    if position <= MOST_DRAWN:
        contestants["plain, drawn and dropped"] = lambda: drawn_at(position, size)
        if find_spec("torchdata") is not None:
            contestants["stateful"] = stateful_at(position, size)
    if mosaic is not None and position < mosaic[1]:
        folder = mosaic[0]
        contestants["mosaic"] = lambda: mosaic_at(position, folder)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(num_rounds):
        for name, resume in contestants.items():
            if resume is not None and (number == 0 or name != "plain, drawn and dropped"):
                started = time.perf_counter()
                resume()
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(each) if each else None for name, each in times.items()}


def written(folder: str, size: int) -> Path:
    """MosaicML's files with `size` samples."""
    from streaming import MDSWriter

    with MDSWriter(out=folder, columns={"sample": "ndarray:float32:64"}) as writer:
        for _ in range(size):
            writer.write({"sample": np.zeros(WIDTH, np.float32)})
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--positions", type=int, nargs="+", default=[0, 10, 10**6, 10**9])
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, load {load:.1f}")
    result: dict[str, Any] = {"load": load, "samples": options.samples, "throughput": {}, "first_batch_ms": {}}
    with tempfile.TemporaryDirectory() as folder:
        mosaic = written(folder, options.samples) if find_spec("streaming") is not None else None
        for num_workers in options.workers:
            found = throughput(options.samples, num_workers, options.rounds, mosaic)
            result["throughput"][num_workers] = found
            for name, values in found.items():
                rate, ratio = values["samples_per_s"], values["times_plain"]
                print(f"{name:27s} {num_workers} workers {rate:10.0f} samples/s {ratio:6.2f} times plain")
        for position in options.positions:
            found_ms = starts(position, options.rounds, None if mosaic is None else (mosaic, options.samples))
            result["first_batch_ms"][position] = found_ms
            texts = (f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in found_ms.items())
            print(f"first batch after {position}, ms: {'; '.join(texts)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
