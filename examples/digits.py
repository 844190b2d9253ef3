"""Train a small residual net on scikit-learn's handwritten digits, or on CIFAR-10: on one process, or on many.

    python examples/digits.py --epochs 10 --lr 1e-3
    torchrun --standalone --nproc-per-node=3 examples/digits.py
    srun --ntasks=8 python examples/digits.py

digits.yaml has the configuration, _config.py checks it, and _data.py reads the images. Cut short (interrupted,
preempted, killed, by a lost node), it goes on from there when the same line is run again.
"""

import argparse
from pathlib import Path

import torch
from _config import PREEMPTED, folders, refuse, settings, start, unfinished_run
from _data import load_images
from torch import nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import DataLoader

from dengine import Engine, Events, distributed
from dengine.__main__ import main as run_command
from dengine.checkpoint import latest
from dengine.config import Conf
from dengine.handlers import Checkpoint, EarlyStopping, LRScheduler, Preemption, ProgressBar
from dengine.metrics import Accuracy, Average, Loss, Throughput
from dengine.tracking import Track

say, draw = distributed.rank_zero_only(print), distributed.rank_zero_only(run_command)


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.body = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))
        self.around = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu(self.body(x) + self.around(x))


def residual_net(num_channels: int) -> nn.Module:
    """From images (N, num_channels, height, width) of any size and range to scores (N, 10)."""
    normal = nn.BatchNorm2d(num_channels, affine=False)  # brings pixels of any range to mean 0, variance 1
    blocks = [Block(num_channels, 32, stride=1), Block(32, 64, stride=2), Block(64, 128, stride=2)]
    return nn.Sequential(normal, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def run(cfg, world, train_set, val_set):
    torch.manual_seed(cfg.seed)
    model = distributed.prepare_model(residual_net(num_channels=train_set.tensors[0].shape[1]))
    bare_model = distributed.unwrap_model(model)
    # exact=True: every sample once over all ranks, so that any number of ranks finds the same accuracy.
    val_loader = distributed.prepare_data_loader(DataLoader(val_set, batch_size=256), exact=True)

    def val_step(engine, batch):
        images, labels = (part.to(world.device) for part in batch)
        with torch.no_grad():
            return bare_model(images.float()), labels

    evaluator = Engine(val_step)
    evaluator.add_metrics({"acc": Accuracy(), "loss": Loss(cross_entropy)})

    def validate(engine=None):
        with distributed.evaluating(model):
            evaluator.run(val_loader)

    def judge(checkpoint):
        bare_model.load_state_dict(torch.load(checkpoint, map_location=world.device, weights_only=True)["model"])
        validate()
        correct = round(float(evaluator.state.metrics["acc"]) * len(val_set))
        say(f"\nValidation accuracy: {correct}/{len(val_set)} = {correct / len(val_set)}")

    if cfg.evaluate_only:
        return judge(cfg.evaluate_only)

    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    train_loader = DataLoader(train_set, batch_size=max(1, cfg.batch_size // world.size), shuffle=True)
    train_loader = distributed.prepare_data_loader(train_loader, seed=cfg.seed)

    def train_step(engine, batch):
        images, labels = (part.to(world.device) for part in batch)
        optimizer.zero_grad()
        loss = cross_entropy(model(images.float()), labels)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach(), "label": labels}  # a tensor: .item() would wait for the device in every step

    trainer = Engine(train_step)
    trainer.add_metrics({"loss": Average(), "samples_per_s": Throughput(lambda output: output["label"])})
    ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output["loss"]})

    config, backend = Conf.to_dict(cfg), cfg.backend or ()
    resume = unfinished_run("digits", cfg)
    with Track.run("digits", config=config, dir=str(cfg.output), backend=backend, resume=resume) as record:
        folder = distributed.broadcast_object(record.dir)  # rank 0 records, and all ranks save into its folder
        trainer.on(Events.EPOCH_COMPLETED, validate)  # after an epoch, what is attached first runs first

        @trainer.on(Events.EPOCH_COMPLETED)
        def log(engine):
            train, val = engine.state.metrics, evaluator.state.metrics
            row = {"epoch": engine.state.epoch + 1, "lr": optimizer.param_groups[0]["lr"], "train/loss": train["loss"]}
            row |= {"val/loss": val["loss"], "val/acc": val["acc"], "samples_per_s": train["samples_per_s"]}
            record.log(row, step=engine.state.iteration)
            say("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

        def accuracy(engine):
            return evaluator.state.metrics["acc"]

        best = Checkpoint({"model": model}, folder, "best", score_function=accuracy, score_name="acc")
        stop = EarlyStopping(cfg.patience, accuracy, trainer)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.3, patience=2)
        schedule = LRScheduler(plateau, metric_name="acc", metric_engine=evaluator)
        objects = {"model": model, "optimizer": optimizer, "stop": stop, "schedule": schedule, "trainer": trainer}
        checkpoint = Checkpoint(objects, folder)
        for handler in (best, stop, schedule, checkpoint):  # what is saved has taken note of the epoch
            trainer.on(Events.EPOCH_COMPLETED, handler)
        *fast, _ = folders(cfg, folder)
        for each in fast:  # which may hold those of another run, too: the prefix tells
            in_memory = Checkpoint(objects, each, folder.name, asynchronous=True, placement="node")
            trainer.on(Events.ITERATION_COMPLETED(every=20), in_memory)
        Preemption(checkpoint).attach(trainer)
        if Checkpoint.resume([*((each, folder.name) for each in fast), folder], objects):
            say(f"Going on after iteration {trainer.state.iteration} of {folder} (remove it to begin anew)")
        state = trainer.run(train_loader, max_epochs=cfg.epochs)
        if state.preempted:
            raise SystemExit(PREEMPTED)  # run me again
        if state.epochs_completed < cfg.epochs:
            say(f"Stopped: no better in {cfg.patience} epochs.")
        path = distributed.broadcast_object(latest(folder, "best"))  # of this start, or of one before it
        judge(path)
        say(f"Checkpoint: {path}\nNumbers:    {folder / 'metrics.jsonl'}\nCurves:     ", end="", flush=True)
        draw(["plot", str(folder), "-o", str(folder / "curves.png")])  # says where the picture is


def read_config():
    """digits.yaml, and over it what the command line says."""
    cfg = Conf.load(Path(__file__).with_suffix(".yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in cfg.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=f"default: {value}")
    given = [f"{name}={value}" for name, value in vars(parser.parse_args()).items() if value is not None]
    cfg = settings(cfg, given)
    if cfg.evaluate_only and not Path(cfg.evaluate_only).is_file():
        refuse(f"evaluate_only={cfg.evaluate_only}: there is no such file")
    return cfg


if __name__ == "__main__":
    cfg = read_config()
    start(lambda world: run(cfg, world, *load_images(cfg.data, cfg.data_dir)))
