"""Train a small residual net on scikit-learn's handwritten digits, or on CIFAR-10: on one process, or on many.

    python examples/digits.py
    torchrun --standalone --nproc-per-node=3 examples/digits.py
    srun --ntasks=8 python examples/digits.py

The images come from _data.py, the picture of the learning curves from _curves.py.
"""

import argparse
import json
from pathlib import Path

import torch
from _curves import draw_curves
from _data import load_cifar10, load_digits
from torch import nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, distributed
from dengine.distributed import World
from dengine.handlers import Checkpoint, EarlyStopping, LRScheduler, ProgressBar
from dengine.metrics import Accuracy, Average, Loss

say = distributed.rank_zero_only(print)


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.around = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu(self.body(x) + self.around(x))


def residual_net(num_channels: int) -> nn.Module:
    """From images (N, num_channels, height, width) of any size and range to scores (N, 10)."""
    return nn.Sequential(
        nn.BatchNorm2d(num_channels, affine=False),  # brings the pixels, whatever their range, to mean 0 and variance 1
        Block(num_channels, 32, stride=1),
        Block(32, 64, stride=2),
        Block(64, 128, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def run(options: argparse.Namespace, world: World, train_set: TensorDataset, val_set: TensorDataset) -> None:
    torch.manual_seed(options.seed)
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
        saved = torch.load(checkpoint, map_location=world.device, weights_only=True)
        bare_model.load_state_dict(saved["model"])
        validate()
        correct = round(evaluator.state.metrics["acc"] * len(val_set))
        say(f"\nValidation accuracy: {correct}/{len(val_set)} = {correct / len(val_set)}")

    if options.evaluate_only:
        judge(options.evaluate_only)
        return

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    batch_size = options.batch_size or max(1, 96 // world.size) * world.size
    train_loader = DataLoader(train_set, batch_size=batch_size, shuffle=True)
    train_loader = distributed.prepare_data_loader(train_loader, global_batch_size=batch_size, seed=options.seed)

    def train_step(engine, batch):
        images, labels = (part.to(world.device) for part in batch)
        optimizer.zero_grad()
        loss = cross_entropy(model(images.float()), labels)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}  # a tensor: .item() would wait for the device in every step

    trainer = Engine(train_step)
    trainer.add_metric(Average(), "loss")
    ProgressBar().attach(trainer, output_transform=lambda output: output)

    # After each epoch these run in the order in which they are attached.
    trainer.on(Events.EPOCH_COMPLETED, validate)
    history = []

    @trainer.on(Events.EPOCH_COMPLETED, rank_zero_only=True)
    def log(engine):
        train, val = engine.state.metrics, evaluator.state.metrics
        row = {"epoch": engine.state.epoch + 1, "step": engine.state.iteration, "lr": optimizer.param_groups[0]["lr"]}
        row |= {"train/loss": train["loss"], "val/loss": val["loss"], "val/acc": val["acc"]}
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        history.append(row)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))

    def accuracy(engine):
        return evaluator.state.metrics["acc"]

    best = Checkpoint(
        to_save={"model": model, "optimizer": optimizer},
        save_dir=options.output,
        filename_prefix="best",
        score_function=accuracy,
        score_name="acc",
    )
    trainer.on(Events.EPOCH_COMPLETED, best)
    trainer.on(Events.EPOCH_COMPLETED, EarlyStopping(options.patience, accuracy, trainer))
    trainer.on(Events.TERMINATED, lambda engine: say(f"Stopped: no better in {options.patience} epochs."))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.3, patience=2)
    trainer.on(Events.EPOCH_COMPLETED, LRScheduler(plateau, metric_name="acc", metric_engine=evaluator))

    trainer.run(train_loader, max_epochs=options.epochs)
    judge(best.last_path)
    report_files(best.last_path, history, options.output)


@distributed.rank_zero_only
def report_files(checkpoint: Path, history: list[dict], folder: Path) -> None:
    print(f"Checkpoint: {checkpoint}")
    print(f"Numbers:    {folder / 'metrics.jsonl'}")
    print(f"Curves:     {draw_curves(history, folder / 'curves.png')}")


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=count, default=30)
    parser.add_argument("--batch-size", type=count, help="samples of all ranks in a step (default: about 96)")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--patience", type=count, default=6, help="epochs without a better accuracy before stopping")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), metavar="DIR")
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 lies, binary or python version")
    parser.add_argument("--evaluate-only", type=Path, metavar="CHECKPOINT", help="print its validation accuracy")
    options = parser.parse_args()
    if (options.data == "cifar10") != (options.data_dir is not None):
        parser.error("--data cifar10 and --data-dir go together")
    if options.evaluate_only and not options.evaluate_only.is_file():
        parser.error(f"--evaluate-only {options.evaluate_only}: there is no such file")
    if not options.lr > 0:
        parser.error(f"--lr {options.lr} must be above 0")
    return options


def main() -> None:
    options = parse_options()
    try:
        train_set, val_set = load_digits() if options.data == "digits" else load_cifar10(options.data_dir)
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    with distributed.process_group() as world:
        try:
            run(options, world, train_set, val_set)
        except KeyboardInterrupt:
            say("Interrupted.")
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
