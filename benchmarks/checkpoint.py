"""What saving costs: the time a file takes, and the time the training is held, next to floors and peers.

A model and its Adam state (`--mb`, in 480 tensors) are saved by each contestant in turn, round after round, so that all
of them meet the same machine; medians count, and the best pair of a round. The floors are

- one copy of the bytes in memory that has been touched before, and
- one write and fsync of the same bytes into a new file, while the one before is kept: whoever keeps it until the new
  one is safe cannot do with less. Freeing the old one is not counted, for nobody who frees it aside.

dengine digests what it writes and lists it in a manifest; what the others leave out (no fsync) is in their names.

    python benchmarks/checkpoint.py [--mb MB] [--rounds R] [--folder FOLDER]

The folder must lie on the disk that is meant: a tmpfs has no fsync to speak of. PyTorch-Ignite and Lightning take part
if they are installed: `pip install "dengine[bench]"`.
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
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dengine import Engine
from dengine.checkpoint import verify
from dengine.handlers import Checkpoint

Contestant = Callable[[], float]  # seconds that count

COPY, WRITE = "one copy in memory", "write + fsync, old file kept"


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
    content = memoryview(torch.randint(0, 255, (num_bytes,), dtype=torch.uint8).numpy())  # type: ignore[arg-type]

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
    steps = count(1)
    checkpoint = Checkpoint(saved, folder / "dengine", global_step_transform=lambda engine, event: next(steps))

    def save() -> float:
        return seconds(lambda: checkpoint(engine))

    return save


def dengine_stall(folder: Path, saved: dict[str, Any], whole: list[float]) -> Contestant:
    engine = Engine(lambda engine, batch: None)
    steps = count(1)
    checkpoint = Checkpoint(
        saved, folder / "dengine-async", global_step_transform=lambda engine, event: next(steps), asynchronous=True
    )

    def save() -> float:
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


def lightning_save(folder: Path, saved: dict[str, Any]) -> Contestant:
    """Fabric's; its Trainer writes by the same function."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    return lambda: seconds(lambda: fabric.save(folder / "lightning.ckpt", saved))


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


def measured(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, by rounds."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            os.sync()  # nobody pays for what the one before him left unwritten
            value = contestant()
            if number:  # the first round allocates
                taken[name].append(value)
    return taken


def run(folder: Path, megabytes: int, rounds: int) -> None:
    model, optimizer = objects(megabytes)
    saved = {"model": model, "optimizer": optimizer}
    sources, whole = tensors(model, optimizer), list[float]()
    num_bytes = sum(source.nbytes for source in sources)
    (folder / "beside").mkdir()
    contestants: dict[str, Contestant] = {
        COPY: memory_copy(sources),
        "dengine, asynchronous: stall": dengine_stall(folder, saved, whole),
        WRITE: write_beside(folder / "beside", num_bytes),
        "dengine": dengine_save(folder, saved),
        "write + fsync, over the old file": bare_write(folder, num_bytes),
        "dengine, verify": dengine_verify(folder),
        "torch.save, no fsync": torch_save(folder, saved, is_synced=False),
        "torch.save + fsync": torch_save(folder, saved, is_synced=True),
        "torch.distributed.checkpoint": dcp_save(folder, saved),
    }
    for package, name, peer in (
        ("ignite", "PyTorch-Ignite, no fsync", ignite_save),
        ("lightning", "Lightning, no fsync", lightning_save),
    ):
        if find_spec(package):
            contestants[name] = peer(folder, saved)
        else:
            print(f"{package} is not installed, and left out")
    taken = measured(contestants, rounds)
    taken["dengine, asynchronous: whole"] = whole[1:]
    print(f"{num_bytes / 1e6:.0f} MB in {len(sources)} tensors, {rounds} rounds; in brackets: the best pair of a round")
    print(f"{'':33} {'median ms':>9} {'least ms':>9} {'GB/s':>6} {'x copy':>14} {'x write + fsync':>16}")
    for name, values in sorted(taken.items(), key=lambda item: statistics.median(item[1])):
        median = statistics.median(values)
        ratios = f"{ratio(values, taken[COPY]):>14} {ratio(values, taken[WRITE]):>16}"
        print(f"{name:33} {median * 1e3:9.0f} {min(values) * 1e3:9.0f} {num_bytes / median / 1e9:6.2f} {ratios}")


def ratio(values: list[float], floor: list[float]) -> str:
    best = min(value / low for value, low in zip(values, floor, strict=True))
    return f"{statistics.median(values) / statistics.median(floor):.2f} ({best:.2f})"


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
