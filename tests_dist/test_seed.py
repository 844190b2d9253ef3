"""What the seed shows of several ranks: its complete training example, and its block on distributed training.

Its other blocks are in tests/test_seed.py.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dengine import Engine, distributed
from dengine.metrics import DistributedAccuracy

EXAMPLE = Path(__file__).resolve().parents[1] / "tests" / "seed" / "complete_example.py"
CONFIG = """\
lr: 0.01
batch_size: 32
epochs: 3
patience: 10
checkpoint_dir: ../checkpoints
"""


def run_example(rank: int, size: int, folder: str) -> dict[str, float]:
    # A folder for each rank: the example has every rank write its final_model.pt into the current one.
    own = Path(folder) / str(rank)
    (own / "config").mkdir(parents=True)
    (own / "config" / "train.sdn").write_text(CONFIG)
    os.chdir(own)
    sys.path.insert(0, str(EXAMPLE.parent))
    with distributed.process_group():
        names = runpy.run_path(str(EXAMPLE))
        return dict(names["evaluator"].state.metrics)


def accuracy_of(weights: dict[str, torch.Tensor]) -> float:
    names = runpy.run_path(str(EXAMPLE.with_name("parts.py")))
    net = names["ResNet50"](num_classes=10).eval()
    net.load_state_dict(weights)
    images, labels = names["images_and_labels"]("val")
    with torch.no_grad():
        return (net(images).argmax(1) == labels).double().mean().item()


def test_complete_training_example(tmp_path: Path) -> None:
    first, second = run_ranks(run_example, 2, str(tmp_path), init=False, deadline_s=120.0)
    assert first == second

    (run_dir,) = tmp_path.glob("*/runs/cifar10/*-*")  # rank 0's alone
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"

    # Over all ranks' samples, what was recorded is what the weights give.
    final = torch.load(tmp_path / "0" / "final_model.pt", weights_only=True)
    final = {name.removeprefix("module."): value for name, value in final.items()}
    assert first["acc"] == rows[-1]["val/acc"] == pytest.approx(accuracy_of(final), abs=1e-12)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pt")
    best = accuracy_of(torch.load(checkpoint, weights_only=True)["model"])
    assert best == pytest.approx(max(row["val/acc"] for row in rows), abs=1e-12)
    assert best > 0.9
    assert (run_dir / "artifacts/cifar10-resnet50/v0/final_model.pt").exists()


def train_as_in_the_seed(rank: int, world_size: int) -> tuple[float, list[float], float]:
    torch.manual_seed(rank)  # each rank's own: DDP has rank 0's weights count
    inputs = torch.arange(12.0).reshape(6, 2) / 12
    train_dataset = TensorDataset(inputs, (inputs.sum(1) > 0.9).long())
    model, local_rank = torch.nn.Linear(2, 2), None  # a rank's number on GPUs
    device = "cpu"

    def train_step(engine: Engine, batch: Any) -> dict[str, Any]:
        x, y = batch
        optimizer.zero_grad()
        pred = model(x)
        loss = torch.nn.functional.cross_entropy(pred, y)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item(), "pred": pred.detach(), "label": y}

    # Setup distributed
    model = DistributedDataParallel(model, device_ids=local_rank and [local_rank])
    train_sampler = DistributedSampler(train_dataset, num_replicas=world_size, rank=rank)
    train_loader = DataLoader(train_dataset, sampler=train_sampler, batch_size=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    evaluator = Engine(lambda engine, batch: (model.module(batch[0]).detach(), batch[1]))

    # Create engine (same as before)
    trainer = Engine(train_step)

    # Distributed metrics
    accuracy = DistributedAccuracy(device=device)
    evaluator.add_metric(accuracy, "acc")

    # Run (automatic synchronization)
    trainer.run(train_loader, max_epochs=10)

    mine = evaluator.run(DataLoader(TensorDataset(*train_dataset[rank:3 + rank]))).metrics["acc"]  # fmt: skip
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
    seen = (model.module(train_dataset[rank : 3 + rank][0]).argmax(1) == train_dataset[rank : 3 + rank][1]).sum()
    return mine, weights, seen.item()


def test_distributed_training() -> None:
    (first, weights, seen), (second, others, others_seen) = run_ranks(train_as_in_the_seed, 2)
    assert weights == others
    assert first == second == (seen + others_seen) / 6
