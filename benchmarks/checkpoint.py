"""What saving costs: the time a file takes, and the time the training is held, next to floors and peers.

A model and its Adam state (`--mb`, in 120 tensors of three sizes) are saved by each contestant in turn, round after
round, so that all of them meet the same machine; medians count. The floors: one copy of the bytes in memory that has
been touched before, and one write with fsync of the same bytes. dengine digests what it writes and lists it in a
manifest; what the others leave out (no fsync, no digest) is in the table's names.

    python benchmarks/checkpoint.py [--mb MB] [--rounds R] [--folder FOLDER]

The folder must lie on the disk that is meant: a tmpfs has no fsync to speak of.
"""

import argparse
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dengine import Engine
from dengine.checkpoint import verify
from dengine.handlers import Checkpoint

Contestant = Callable[[], float]  # seconds that count


def objects(megabytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its stepped optimizer, together of `megabytes`: a third are parameters."""
    unit = megabytes * 1_000_000 // 4 // 3 // 40 // 13
    model = nn.ParameterList(nn.Parameter(torch.randn(unit * factor)) for _ in range(40) for factor in (1, 4, 8))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = optimizer.state_dict()["state"].values()
    return [*model.state_dict().values(), *(value for state in states for value in state.values())]


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


# -- floors ------------------------------------------------------------------------------------------------------


def memory_copy(sources: list[torch.Tensor]) -> Contestant:
    targets = [torch.empty_like(source) for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return lambda: seconds(copy)


def bare_write(folder: Path, num_bytes: int) -> Contestant:
    content = memoryview(torch.randint(0, 255, (num_bytes,), dtype=torch.uint8).numpy())

    def write() -> None:
        descriptor = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        left = content
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        os.close(descriptor)

    return lambda: seconds(write)


def write_beside(folder: Path, num_bytes: int) -> Contestant:
    """The floor of whoever keeps the old file until the new one is safe: it cannot use the old one's memory again."""
    write = bare_write(folder, num_bytes)

    def beside() -> float:
        taken = write()
        os.replace(folder / "bare", folder / "kept")
        return taken

    return beside


# -- dengine -----------------------------------------------------------------------------------------------------


def dengine_save(folder: Path, saved: dict[str, Any]) -> Contestant:
    engine = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint(saved, folder / "dengine")

    def save() -> float:
        engine.state.iteration += 1
        return seconds(lambda: checkpoint(engine))

    return save


def dengine_stall(folder: Path, saved: dict[str, Any], whole: list[float]) -> Contestant:
    engine = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint(saved, folder / "dengine-async", asynchronous=True)

    def save() -> float:
        engine.state.iteration += 1
        started = time.perf_counter()
        checkpoint(engine)
        held = time.perf_counter() - started
        checkpoint.wait()
        whole.append(time.perf_counter() - started)
        return held

    return save


def dengine_verify(folder: Path) -> Contestant:
    return lambda: seconds(lambda: verify(next((folder / "dengine").glob("*.pt"))))


# -- peers -------------------------------------------------------------------------------------------------------


def torch_save(folder: Path, saved: dict[str, Any], *, is_synced: bool) -> Contestant:
    def save() -> None:
        with open(folder / f"torch{is_synced}.pt", "wb") as file:
            torch.save({name: value.state_dict() for name, value in saved.items()}, file)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())

    return lambda: seconds(save)


def ignite_save(folder: Path, saved: dict[str, Any]) -> Contestant:
    from ignite.engine import Engine as IgniteEngine
    from ignite.handlers import Checkpoint as IgniteCheckpoint
    from ignite.handlers import DiskSaver

    engine = IgniteEngine(lambda engine, batch: None)
    saver = DiskSaver(str(folder / "ignite"), create_dir=True, require_empty=False)
    checkpoint = IgniteCheckpoint(saved, saver, n_saved=1)

    def save() -> float:
        engine.state.iteration += 1
        return seconds(lambda: checkpoint(engine))

    return save


def dcp_save(folder: Path, saved: dict[str, Any]) -> Contestant:
    import torch.distributed.checkpoint as dcp

    count = 0

    def save() -> float:
        nonlocal count
        count += 1
        states = {name: value.state_dict() for name, value in saved.items()}
        taken = seconds(lambda: dcp.save(states, checkpoint_id=folder / f"dcp{count}", no_dist=True))
        shutil.rmtree(folder / f"dcp{count - 1}", ignore_errors=True)
        return taken

    return save


# -- measuring ---------------------------------------------------------------------------------------------------


def measured(contestants: dict[str, Contestant], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            os.sync()  # nobody pays for what the one before him left unwritten
            value = contestant()
            if number:  # the first round allocates
                taken[name].append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def run(folder: Path, megabytes: int, rounds: int) -> None:
    model, optimizer = objects(megabytes)
    saved = {"model": model, "optimizer": optimizer}
    sources, whole = tensors(model, optimizer), list[float]()
    num_bytes = sum(source.nbytes for source in sources)
    (folder / "beside").mkdir()
    contestants: dict[str, Contestant] = {
        "memcpy": memory_copy(sources),
        "write + fsync": bare_write(folder, num_bytes),
        "write + fsync, old one kept": write_beside(folder / "beside", num_bytes),
        "dengine": dengine_save(folder, saved),
        "dengine, asynchronous: stall": dengine_stall(folder, saved, whole),
        "dengine, verify": dengine_verify(folder),
        "torch.save, no fsync": torch_save(folder, saved, is_synced=False),
        "torch.save + fsync": torch_save(folder, saved, is_synced=True),
        "torch.distributed.checkpoint": dcp_save(folder, saved),
    }
    if find_spec("ignite"):
        contestants["PyTorch-Ignite, no fsync"] = ignite_save(folder, saved)
    medians = measured(contestants, rounds)
    medians["dengine, asynchronous: whole"] = statistics.median(whole[1:])
    print(f"{num_bytes / 1e6:.0f} MB in {len(sources)} tensors, medians of {rounds} rounds")
    print(f"{'':30} {'ms':>7} {'GB/s':>6} {'x memcpy':>9} {'x write + fsync':>16}")
    for name, value in sorted(medians.items(), key=lambda item: item[1]):
        ratios = f"{value / medians['memcpy']:9.2f} {value / medians['write + fsync']:16.2f}"
        print(f"{name:30} {value * 1e3:7.0f} {num_bytes / value / 1e9:6.2f} {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; by default, in the system's own")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, {threads} threads")
    for megabytes in options.mb:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            run(Path(folder), megabytes, options.rounds)


if __name__ == "__main__":
    main()
