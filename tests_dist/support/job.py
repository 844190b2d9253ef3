"""One training job for tests of kills, signals and restarts: all that a resumed run must find again, in a second.

A model with dropout and batch norm in DDP, Adam, a schedule, data that augment at random, a collate function that
draws, a step that draws from every generator, metrics, an evaluation, checkpoints within the epoch. What two jobs
say at their end (`End`) is equal only where all of it went on bit for bit.
"""

import functools
import hashlib
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blows import Blow, Striker
from ranks import RankFailed, run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint, LRScheduler, Preemption
from dengine.metrics import Average

__all__ = [
    "DEADLINE_S",
    "EPOCHS",
    "ITERATIONS",
    "PER_EPOCH",
    "SAVE_EVERY",
    "VARIANTS",
    "End",
    "Variant",
    "attempt",
    "digest",
    "job",
    "whole",
]

LENGTH, GLOBAL_BATCH, EPOCHS = 53, 12, 3
PER_EPOCH = 5  # four global batches, and five samples that do not divide by 2 or 3 ranks
ITERATIONS = EPOCHS * PER_EPOCH
SAVE_EVERY = 2
DEADLINE_S = 120

Sample = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """What must make no difference. `num_nodes`: with a copy in memory on each of these; None: without."""

    asynchronous: bool = False
    workers: int = 0
    persistent: bool = False
    num_nodes: int | None = None


VARIANTS = [Variant(asynchronous, *workers) for asynchronous in (False, True) for workers in ((0,), (2,), (2, True))]


@dataclass(frozen=True)
class End:
    """What became of a job on one rank; `state` is to be the same, however often it was interrupted."""

    preempted: bool
    begun: int
    state: dict[str, Any]
    warned: list[str]
    num_calls: int = field(compare=False, default=0)
    seconds: float = field(compare=False, default=0.0)


@functools.cache
def whole(size: int) -> tuple[End, ...]:
    """The oracle: the job without a blow, saving in the loop, without workers."""
    with tempfile.TemporaryDirectory() as folder:
        return tuple(run_ranks(job, size, folder, Variant(), None, init=False, deadline_s=DEADLINE_S))


class Augmented(Dataset[Sample]):
    """Each sample draws from every generator, some of them more often."""

    def __init__(self, strike: Striker) -> None:
        self._strike = strike
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Sample:
        if get_worker_info() is not None:
            self._strike.at("worker", 100 * self._epoch + index)
        for _ in range(index % 3):
            random.random(), np.random.rand(), torch.rand(())
        noise = torch.randn(4) + random.random() + float(np.random.rand())
        return torch.full((4,), index / LENGTH) + 0.1 * noise, torch.tensor([float(index % 2)])


def mixed(samples: list[Sample]) -> Sample:
    """Mixes pictures, as many do: it draws another number of times for another batch."""
    inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
    weight = random.random() * float(np.random.rand())
    order = torch.randperm(len(samples))
    return (1 - weight) * inputs + weight * inputs[order], (1 - weight) * targets + weight * targets[order]


class Marker:
    """Stands between the other objects, for a blow while states are loaded."""

    def __init__(self, strike: Striker) -> None:
        self._strike = strike

    def state_dict(self) -> dict[str, int]:
        return {"nothing": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._strike.at("load")


def attempt(folder: Path, size: int, variant: Variant, blow: Blow | None, grace_s: float = 0.0) -> list[End] | None:
    """The ends of all ranks, or None where the blow has killed the job. Whoever is left is killed, as torchrun does."""
    try:
        return run_ranks(job, size, str(folder), variant, blow, init=False, deadline_s=DEADLINE_S, grace_s=grace_s)
    except RankFailed as error:
        if blow is None:
            raise
        kind, message, _ = error.failures[error.rank]
        by_signal = kind == "ProcessDied" and str(-signal.SIGKILL) in message
        # A rank that the killed one was about to connect to may say so before the end of that process is noticed.
        by_signal = by_signal or (kind == "LaunchError" and "lost another rank" in message)
        by_worker = blow.moment == "worker" and kind == "RuntimeError" and "DataLoader worker" in message
        if not (by_signal or by_worker):
            raise
        return None


def job(rank: int, size: int, folder: str, variant: Variant, blow: Blow | None) -> End:
    """The training from its newest checkpoint to its end, or to the blow."""
    started = time.perf_counter()
    strike = Striker(blow, rank)
    if variant.num_nodes is not None:
        node, local_rank = divmod(rank, size // variant.num_nodes)
        local = {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": size // variant.num_nodes, "GROUP_RANK": node}
        os.environ.update({name: str(value) for name, value in local.items()})
    with distributed.process_group(timeout=300), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        objects, trainer, loader = _built(rank, size, variant, strike)
        save = _save_and_resume if variant.num_nodes is None else _save_on_nodes_and_resume
        save(objects, trainer, folder, variant, strike)
        begun = trainer.state.iteration
        state = trainer.run(loader, max_epochs=EPOCHS)
        seconds = time.perf_counter() - started
        end = {} if state.preempted else _end(objects, trainer, rank)
    return End(state.preempted, begun, end, [str(each.message) for each in warned], strike.num_calls, seconds)


def _built(rank: int, size: int, variant: Variant, strike: Striker) -> tuple[dict[str, Any], Engine, Any]:
    torch.manual_seed(7)
    model = distributed.prepare_model(
        nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.7))
    data: DataLoader[Any] = DataLoader(
        Augmented(strike),
        shuffle=True,
        collate_fn=mixed,
        num_workers=variant.workers,
        persistent_workers=variant.persistent and variant.workers > 0,
    )
    loader = distributed.prepare_data_loader(data, global_batch_size=GLOBAL_BATCH, seed=3)
    trainer = Engine(_step(model, optimizer, strike))
    trainer.on(Events.ITERATION_STARTED, lambda engine: strike.at("begun", engine.state.iteration))
    trainer.on(Events.EPOCH_STARTED, lambda engine: strike.at("epoch_started", engine.state.epoch + 1))
    trainer.on(Events.ITERATION_COMPLETED, schedule)
    trainer.add_metric(Average(), "loss")
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(100 + rank)
    marker = Marker(strike)
    return (
        {"model": model, "marker": marker, "optimizer": optimizer, "schedule": schedule, "trainer": trainer},
        trainer,
        loader,
    )


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, strike: Striker) -> Callable[[Engine, Any], torch.Tensor]:
    def step(engine: Engine, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        optimizer.zero_grad()
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        loss = nn.functional.mse_loss(scale * model(inputs), targets)
        loss.backward()
        strike.at("backward", engine.state.iteration)
        optimizer.step()
        strike.at("stepped", engine.state.iteration)
        return loss.detach()

    return step


def _save_and_resume(objects: dict[str, Any], trainer: Engine, folder: str, variant: Variant, strike: Striker) -> None:
    """The checkpoints, the evaluation and the history, in the order of a real script."""
    checkpoint = Checkpoint(objects, folder, n_saved=2, asynchronous=variant.asynchronous)
    trainer.state.history = []
    trainer.state.persist("history")
    evaluator, held_out = _evaluator(objects["model"], trainer, strike)

    def evaluate(engine: Engine) -> None:
        with distributed.evaluating(objects["model"]):
            score = evaluator.run(held_out).metrics["loss"]
        engine.state.history.append([float(engine.state.metrics["loss"]), float(score)])

    best = Checkpoint(
        {"model": objects["model"]},
        folder,
        "best",
        score_function=lambda engine: -engine.state.history[-1][1],
        asynchronous=variant.asynchronous,
    )
    trainer.on(Events.EPOCH_COMPLETED, evaluate)
    trainer.on(Events.EPOCH_COMPLETED, best)
    trainer.on(Events.ITERATION_COMPLETED(every=SAVE_EVERY), checkpoint)
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: strike.at("saved", engine.state.iteration), priority=-1)
    trainer.on(Events.EPOCH_COMPLETED, checkpoint)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: strike.at("epoch_completed", engine.state.epoch + 1), priority=-1)
    Preemption(checkpoint).attach(trainer)
    Checkpoint.resume(folder, objects)


def _save_on_nodes_and_resume(
    objects: dict[str, Any], trainer: Engine, folder: str, variant: Variant, strike: Striker
) -> None:
    """The same with a copy in memory every few iterations, and one on the disk at the end of each epoch. After each
    iteration, rank 0 notes it in the file `reached`, with the last copy that is safe.
    """
    fast, safe = f"{folder}/fast{os.environ['GROUP_RANK']}", f"{folder}/safe"
    in_memory = Checkpoint(objects, fast, n_saved=2, asynchronous=variant.asynchronous, placement="node")
    on_disk = Checkpoint(objects, safe, asynchronous=variant.asynchronous)
    trainer.state.history = []
    trainer.state.persist("history")
    evaluator, held_out = _evaluator(objects["model"], trainer, strike)

    def evaluate(engine: Engine) -> None:
        with distributed.evaluating(objects["model"]):
            score = evaluator.run(held_out).metrics["loss"]
        engine.state.history.append([float(engine.state.metrics["loss"]), float(score)])

    def note(engine: Engine) -> None:
        at = engine.state.iteration
        strike.at("saved", at)
        if distributed.world().rank == 0:
            finished = 0 if in_memory.last_path is None else int(in_memory.last_path.stem.rpartition("_")[2])
            with open(f"{folder}/reached", "a") as file:
                file.write(f"{at} {finished}\n")

    trainer.on(Events.EPOCH_COMPLETED, evaluate)
    trainer.on(Events.ITERATION_COMPLETED(every=SAVE_EVERY), in_memory)
    trainer.on(Events.EPOCH_COMPLETED, on_disk)
    trainer.on(Events.ITERATION_COMPLETED, note, priority=-1)
    Checkpoint.resume([fast, safe], objects)


def _evaluator(model: nn.Module, trainer: Engine, strike: Striker) -> tuple[Engine, Any]:
    def judge(engine: Engine, batch: Any) -> torch.Tensor:
        strike.at("evaluating", trainer.state.epoch + 1)
        with torch.no_grad():
            return distributed.unwrap_model(model)(batch).square().mean()

    evaluator = Engine(judge)
    evaluator.add_metric(Average(), "loss")
    samples = torch.linspace(-1, 1, 28).reshape(7, 4)
    return evaluator, distributed.prepare_data_loader(DataLoader(samples, batch_size=3), exact=True)  # type: ignore[arg-type]


def _end(objects: dict[str, Any], trainer: Engine, rank: int) -> dict[str, Any]:
    net = distributed.unwrap_model(objects["model"])
    return {
        # Between steps, the statistics of batch norm are each rank's own; rank 0's count.
        "model": digest(net.state_dict() if rank == 0 else dict(net.named_parameters())),
        "optimizer": digest(objects["optimizer"].state_dict()),
        "schedule": digest(objects["schedule"].state_dict()),
        "history": trainer.state.history,
        "place": (trainer.state.epoch, trainer.state.iteration, trainer.state.epochs_completed),
        "next draws": (random.random(), float(np.random.rand()), torch.rand(()).item()),
    }


def digest(state: Any) -> str:
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                found.update(repr(key).encode())
                take(value[key])
        elif isinstance(value, (list, tuple)):
            for part in value:
                take(part)
        else:
            found.update(repr(value).encode())

    take(state)
    return found.hexdigest()
