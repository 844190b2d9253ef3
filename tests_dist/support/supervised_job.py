"""A script for any launcher: trains on uneven shards, and rank 0 prints the sum of the weights.

python supervised_job.py [dengine first | accelerate first | accelerate only]
"""

import sys
import time
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dengine import create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.metrics import Accuracy


def train(accelerator: Accelerator | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(23, 4, dtype=torch.float64), torch.arange(23) % 3
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=6)
    loader = distributed.prepare_data_loader(loader, exact=True, global_batch_size=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(
        model, optimizer, cross_entropy, gradient_accumulation_steps=2, accelerator=accelerator
    )
    trainer.run(loader, max_epochs=2)
    evaluator = create_supervised_evaluator(model, {"acc": Accuracy()}, accelerator=accelerator)
    accuracy = evaluator.run(loader).metrics["acc"]
    total = sum(parameter.abs().sum().item() for parameter in model.parameters())
    here = distributed.world()
    distributed.rank_zero_only(print)(f"{here.size} ranks: {accuracy * 23:.6f} right, weights {total:.9f}", flush=True)


def main(order: str) -> None:
    accelerator = Accelerator(cpu=True) if order.startswith("accelerate") else None
    with nullcontext() if order == "accelerate only" else distributed.process_group():
        if order == "dengine first":
            accelerator = Accelerator(cpu=True)
        train(accelerator)
    if order == "accelerate only":
        # Gloo's thread frees the last work under Python's lock, and where Python has ended by then, torch aborts.
        # process_group() waits for that; end_training() does not.
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
