"""Training with everything on, dengine and its peers, against the bare loop of torch, in turns within one run.

Everything: accuracy and mean loss of the epoch, a progress bar, a row of tracking every 10 iterations, a checkpoint of
model and optimizer at the end of the epoch (asynchronous if there is such a thing). The bare loop has none of it.
Compared is CPU time, of all threads of rank 0's process: what the machine spends; on a GPU, where the process waits
for the device at the end of an epoch, wall-clock time. Printed are medians over rounds of the ratio to the bare loop of
the same round.

    python benchmarks/training.py [--device cuda] [--ranks 2] [--rounds R] [--work mlp conv] [--only dengine ignite ...]
"""

import argparse
import csv
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from control import free_ports
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dengine import Events, create_supervised_trainer, distributed
from dengine.handlers import Checkpoint, ProgressBar, TrackingHandler
from dengine.metrics import Accuracy, Average
from dengine.tracking import Track

LOG_EVERY = 10
NUM_BATCHES = 20  # that differ
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """A model and the batches of one epoch, which are used again in each."""

    make_model: Callable[[], nn.Module]
    batches: list[Batch]

    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = self.make_model().to(distributed.world().device)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def on_device(self) -> Iterable[Batch]:
        """The batches as the loop by hand takes them."""
        device = distributed.world().device
        if device.type == "cpu":
            return self.batches
        return ((x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in self.batches)


def batches_of(shape: tuple[int, ...], number: int) -> list[Batch]:
    """As a loader would give them: on the host, pinned if there is a device to copy to."""
    made = [(torch.randn(shape), torch.randint(0, 10, shape[:1])) for _ in range(NUM_BATCHES)]
    if distributed.world().device.type == "cuda":
        made = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in made]
    return [made[index % NUM_BATCHES] for index in range(number)]


def mlp(iterations: int, batch_size: int) -> Work:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    return Work(make, batches_of((batch_size, 784), iterations))


def conv(iterations: int, batch_size: int) -> Work:
    def block(width_in: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width_in, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def make() -> nn.Module:
        return nn.Sequential(
            block(3, 32), block(32, 64), block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
        )

    return Work(make, batches_of((batch_size, 3, 32, 32), max(iterations // 9, 1)))


WORKS = {"mlp": mlp, "conv": conv}


# -- contestants: each gives a function that trains one epoch -----------------------------------------------------


def bare(work: Work, folder: Path) -> Callable[[], object]:
    model, optimizer = work.model_and_optimizer()
    if distributed.world().size > 1:
        model = DistributedDataParallel(model)

    def epoch() -> None:
        model.train()
        for inputs, targets in work.on_device():
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    return epoch


def dengine(work: Work, folder: Path) -> Callable[[], object]:
    model, optimizer = work.model_and_optimizer()
    model = distributed.prepare_model(model)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy)
    trainer.add_metrics({"acc": Accuracy(), "loss": Average()})
    ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output["loss"]})
    to_save = {"model": model, "optimizer": optimizer, "trainer": trainer}
    trainer.on(Events.EPOCH_COMPLETED, Checkpoint(to_save, folder, asynchronous=True))
    run = Track.run("benchmark", dir=folder).__enter__() if distributed.world().rank == 0 else None
    log = TrackingHandler(run, output_transform=lambda output: {"loss": output["loss"]})
    trainer.on(Events.ITERATION_COMPLETED(every=LOG_EVERY), log)
    trainer.on(Events.EPOCH_COMPLETED, TrackingHandler(run, metric_names="all"))
    return lambda: trainer.run(work.batches)


class Rows:
    """A log file by hand, for peers without one: a JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "rows.jsonl").open("a") if distributed.world().rank == 0 else None

    def log(self, step: int, **values: float) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()


def ignite(work: Work, folder: Path) -> Callable[[], object]:
    from ignite.contrib.handlers import ProgressBar as IgniteBar
    from ignite.engine import Events as IgniteEvents
    from ignite.engine import create_supervised_trainer as create
    from ignite.handlers import Checkpoint as IgniteCheckpoint
    from ignite.handlers import DiskSaver
    from ignite.metrics import Accuracy as IgniteAccuracy
    from ignite.metrics import Loss as IgniteLoss

    model, optimizer = work.model_and_optimizer()
    if distributed.world().size > 1:
        model = DistributedDataParallel(model)

    def output(x: Any, y: Any, pred: Any, loss: Any) -> Any:
        return {"loss": loss.item(), "pair": (pred.detach(), y)}

    device = distributed.world().device
    trainer = create(model, optimizer, cross_entropy, device=device, non_blocking=True, output_transform=output)
    IgniteAccuracy(output_transform=lambda out: out["pair"], device=device).attach(trainer, "acc")
    IgniteLoss(cross_entropy, output_transform=lambda out: out["pair"], device=device).attach(trainer, "loss")
    if distributed.world().rank == 0:
        IgniteBar().attach(trainer, output_transform=lambda out: {"loss": out["loss"]})
    rows = Rows(folder)

    @trainer.on(IgniteEvents.ITERATION_COMPLETED(every=LOG_EVERY))
    def log(engine: Any) -> None:
        rows.log(engine.state.iteration, loss=engine.state.output["loss"])

    to_save = {"model": model, "optimizer": optimizer, "trainer": trainer}
    saver = IgniteCheckpoint(to_save, DiskSaver(str(folder / "ignite"), require_empty=False), n_saved=1)
    trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, saver)
    return lambda: trainer.run(work.batches, max_epochs=1) and None


def by_hand(
    work: Work, folder: Path, prepared: Callable[[nn.Module, Any], tuple[Any, Any, Any]]
) -> Callable[[], object]:
    """The loop that users of accelerate and Fabric write: torchmetrics, tqdm, a log and torch.save around theirs."""
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy
    from tqdm import tqdm

    model, optimizer, backward = prepared(*work.model_and_optimizer())
    device = distributed.world().device
    accuracy, mean_loss = MulticlassAccuracy(10, average="micro").to(device), MeanMetric().to(device)
    rows = Rows(folder)
    is_lead = distributed.world().rank == 0

    def epoch() -> None:
        model.train()
        accuracy.reset()
        mean_loss.reset()
        bar = tqdm(work.on_device(), total=len(work.batches), disable=not is_lead)
        for step, (inputs, targets) in enumerate(bar, start=1):
            optimizer.zero_grad()
            pred = model(inputs)
            loss = cross_entropy(pred, targets)
            backward(loss)
            optimizer.step()
            accuracy.update(pred.detach(), targets)
            mean_loss.update(loss.detach())
            if step % LOG_EVERY == 0:
                bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
                rows.log(step, loss=loss.item())
        rows.log(step, acc=accuracy.compute().item(), mean_loss=mean_loss.compute().item())
        if is_lead:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "by_hand.pt")

    return epoch


def accelerate(work: Work, folder: Path) -> Callable[[], object]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=distributed.world().device.type == "cpu")

    def prepared(model: nn.Module, optimizer: Any) -> tuple[Any, Any, Any]:
        return *accelerator.prepare(model, optimizer), accelerator.backward

    return by_hand(work, folder, prepared)


def fabric(work: Work, folder: Path) -> Callable[[], object]:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    size = distributed.world().size
    backend = "gloo" if distributed.world().device.type == "cpu" else "nccl"
    strategy: Any = DDPStrategy(process_group_backend=backend) if size > 1 else "auto"
    made = Fabric(accelerator=distributed.world().device.type, devices=size, strategy=strategy)
    made.launch()

    def prepared(model: nn.Module, optimizer: Any) -> tuple[Any, Any, Any]:
        return *made.setup(model, optimizer), made.backward

    return by_hand(work, folder, prepared)


def lightning(work: Work, folder: Path) -> Callable[[], object]:
    import lightning as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader
    from torchmetrics.classification import MulticlassAccuracy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.optimizer = work.model_and_optimizer()
            self.accuracy = MulticlassAccuracy(10, average="micro")

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, targets = batch
            pred = self.net(inputs)
            loss = cross_entropy(pred, targets)
            self.accuracy(pred.detach(), targets)
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log("acc", self.accuracy, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return self.optimizer

    module = Module()
    loader: Any = DataLoader(work.batches, batch_size=None)  # type: ignore[arg-type]

    def epoch() -> None:
        trainer = pl.Trainer(
            accelerator=distributed.world().device.type,
            devices=distributed.world().size,
            strategy="ddp" if distributed.world().size > 1 else "auto",
            max_epochs=1,
            logger=CSVLogger(folder, name="lightning"),
            callbacks=[ModelCheckpoint(folder / "lightning")],
            log_every_n_steps=LOG_EVERY,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)

    return epoch


CONTESTANTS = {
    "bare": bare,
    "dengine": dengine,
    "ignite": ignite,
    "accelerate": accelerate,
    "fabric": fabric,
    "lightning": lightning,
}
NEEDED = {"ignite": "ignite", "fabric": "lightning", "lightning": "lightning", "accelerate": "torchmetrics"}


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(
    works: list[str], names: list[str], rounds: int, iterations: int, batch_size: int
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """For each work and contestant the seconds an iteration of each round, of CPU and of wall-clock time."""
    taken: dict[str, dict[str, list[dict[str, float]]]] = {}
    for work_name in works:
        work = WORKS[work_name](iterations, batch_size)
        folders = {name: Path(tempfile.mkdtemp(prefix=f"dengine-{name}-")) for name in names}
        epochs = {name: CONTESTANTS[name](work, folders[name]) for name in names}
        of_work: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(-1, rounds):
            order = names if number % 2 else names[::-1]
            for name in order:
                distributed.barrier("a turn")
                cpu_s, wall_s = time.process_time(), time.perf_counter()
                epochs[name]()
                if distributed.world().device.type == "cuda":
                    torch.cuda.synchronize()
                distributed.barrier("the end of a turn")
                cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
                if number >= 0:  # the first round warms up
                    of_work[name].append({"cpu": cpu_s / len(work.batches), "wall": wall_s / len(work.batches)})
        taken[work_name] = of_work
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    return taken


def one_rank(rank: int, size: int, port: int, log: str, options: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if size > 1:
        values = (rank, size, rank, size, 0, "127.0.0.1", port, "benchmark")
        names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID"
        os.environ |= {name: str(value) for name, value in zip(names.split(), values, strict=True)}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)  # bars and the peers' announcements
    os.dup2(output, 2)
    with distributed.process_group():
        taken = measure(options.work, options.only, options.rounds, options.iterations, options.batch_size)
    if rank == 0:
        answers.put(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--iterations", type=int, default=938, help="of an epoch of the MLP; of the conv net a ninth")
    parser.add_argument("--batch-size", type=int, default=64, help="of a rank")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    options = parser.parse_args()
    missing = [name for name in options.only if name in NEEDED and not find_spec(NEEDED[name])]
    options.only = ["bare", *(name for name in options.only if name not in ("bare", *missing))]
    answers: Any = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "output")
        arguments = (options.ranks, free_ports(1)[0], log, options, answers)
        try:
            multiprocessing.start_processes(one_rank, arguments, nprocs=options.ranks, join=True)
        except Exception:
            print(Path(log).read_text()[-4000:], file=sys.stderr)
            raise
    report(answers.get(), options)
    if missing:
        print(f"Not installed, so not compared: {', '.join(missing)}.")


def report(taken: dict[str, dict[str, list[dict[str, float]]]], options: argparse.Namespace) -> None:
    device = platform.machine() if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {options.ranks} ranks, {options.rounds} rounds")
    table = csv.writer(sys.stdout, delimiter="\t")
    table.writerow(["work", "contestant", "CPU ms", "x bare", "quartiles", "wall ms", "x bare", "quartiles"])
    for work_name, of_work in taken.items():
        for name, rows in of_work.items():
            line: list[Any] = [work_name, name]
            for what in ("cpu", "wall"):
                ratios = [one[what] / base[what] for one, base in zip(rows, of_work["bare"], strict=True)]
                low, middle, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4)
                line += [
                    f"{1e3 * statistics.median(row[what] for row in rows):.3f}",
                    f"{middle:.3f}",
                    f"{low:.3f} to {high:.3f}",
                ]
            table.writerow(line)


if __name__ == "__main__":
    main()
