"""Ranks without a mesh: what DDP needs is all that is sent while a run is under way, and the rest is counted here."""

from typing import Any

import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.metrics import Accuracy, Average, Loss
from dengine.torch_internals import num_collectives, process_groups

BATCH_SIZE = 4
RUNS = [(4, 1), (4, 1), (4, 3), (9, 1)]  # batches of an epoch, and epochs


def loader(num_batches: int, *, exact: bool) -> DataLoader[Any]:
    """With so many batches on each of two ranks."""
    num_samples = 2 * BATCH_SIZE * num_batches
    inputs, labels = torch.arange(6.0 * num_samples).view(-1, 6).sin(), torch.arange(num_samples) % 3
    given = DataLoader(TensorDataset(inputs, labels), batch_size=BATCH_SIZE, shuffle=True)
    return distributed.prepare_data_loader(given, exact=exact, seed=1)


def sent_by(engine: Engine, num_batches: int, num_epochs: int, *, exact: bool) -> int:
    """The collectives of a run, in all groups of this process."""
    data = loader(num_batches, exact=exact)
    before = sum(map(num_collectives, process_groups()))
    engine.run(data, max_epochs=num_epochs)
    return sum(map(num_collectives, process_groups())) - before


def sent(rank: int, size: int) -> dict[str, list[int]]:
    found = {}
    with distributed.process_group():
        model = distributed.prepare_model(nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = nn.functional.cross_entropy
        for exact in (False, True):
            trainer = create_supervised_trainer(model, optimizer, loss, max_grad_norm=1.0)
            trainer.add_metric(Average(lambda output: output["loss"]), "loss")
            evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy(), "loss": Loss(loss)})
            bare = Engine(lambda engine, batch: batch)
            bare.add_metric(Accuracy(output_transform=lambda batch: (batch[0][:, :3], batch[1])), "accuracy")
            bare.add_metric(Average(lambda batch: batch[0].mean()), "mean")
            for name, engine in (("trainer", trainer), ("evaluator", evaluator), ("bare", bare)):
                found[f"{name}, exact={exact}"] = [
                    sent_by(engine, num_batches, num_epochs, exact=exact) for num_batches, num_epochs in RUNS
                ]
    return found


def test_what_is_sent_without_a_mesh_is_known_to_the_last_collective() -> None:
    # One comparison at the start of a run, one reduction of all metrics an epoch, and nothing an iteration.
    alone = [1 + num_epochs for _, num_epochs in RUNS]
    # The trainer adds DDP's all-reduce of the gradients, and asks twice an epoch who has how many samples and batches.
    trained = [1 + num_epochs * (1 + 2 + num_batches) for num_batches, num_epochs in RUNS]
    for found in run_ranks(sent, 2, init=False):
        for exact in (False, True):
            assert found[f"evaluator, exact={exact}"] == alone
            assert found[f"bare, exact={exact}"] == alone
        assert found["trainer, exact=True"] == trained
        # DDP orders its buckets in its first two collectives.
        assert found["trainer, exact=False"] == [trained[0] + 2, *trained[1:]]
