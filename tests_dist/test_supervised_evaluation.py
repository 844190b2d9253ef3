"""Supervised evaluation over real ranks: each sample counts once, and no rank waits for one that has no batch left."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dengine import Events, create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.control.call_log import num_joined
from dengine.metrics import Accuracy, Average, ConfusionMatrix, Loss

METRICS = {"acc": Accuracy, "loss": lambda: Loss(cross_entropy), "table": lambda: ConfusionMatrix(num_classes=3)}
LENGTHS = [1, 2, 7, 13]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def data_set(length: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(length, 4, generator=generator, dtype=torch.float64), torch.arange(length) % 3)


def by_hand(length: int) -> dict[str, Any]:
    inputs, targets = data_set(length).tensors
    with torch.no_grad():
        pred = net().eval()(inputs)
    table = torch.zeros(3, 3, dtype=torch.int64)
    for label, guess in zip(targets, pred.argmax(1), strict=True):
        table[label, guess] += 1
    return {
        "acc": (pred.argmax(1) == targets).double().mean().item(),
        "loss": cross_entropy(pred, targets).item(),
        "table": table.double(),
    }


def evaluated(rank: int, size: int, strategy: str) -> list[tuple[dict[str, Any], int, bool]]:
    """For each length the metrics, the collectives that were joined, and whether the model was left as it was."""
    model = distributed.prepare_model(net(), strategy)  # type: ignore[arg-type]
    bare = distributed.unwrap_model(model)
    if rank > 0:
        bare[1].running_mean.fill_(100.0)
    evaluator = create_supervised_evaluator(model, {name: make() for name, make in METRICS.items()})
    found = []
    for length in LENGTHS:
        loader = DataLoader(data_set(length), batch_size=2)
        loader = distributed.prepare_data_loader(loader, exact=True)
        before = num_joined(size)
        metrics = evaluator.run(loader).metrics
        kept = bare[1].running_mean[0].item() == (100.0 if rank else 0.0)
        found.append((dict(metrics), num_joined(size) - before, kept and model.training))
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_sample_counts_once_on_any_number_of_ranks(size: int, strategy: str) -> None:
    for found in run_ranks(evaluated, size, strategy, deadline_s=120.0):
        for length, (metrics, _, is_as_before) in zip(LENGTHS, found, strict=True):
            expected = by_hand(length)
            assert metrics["acc"] == expected["acc"]
            assert torch.equal(metrics["table"].double(), expected["table"])
            assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-12)
            assert is_as_before


def test_an_evaluation_in_ddp_talks_at_its_beginning_and_its_end_only() -> None:
    for found in run_ranks(evaluated, 2, "ddp"):
        collectives = [number for _, number, _ in found]
        # However many batches: the metrics are compared, the buffers of two types sent, the metrics reduced.
        assert len(set(collectives[1:])) == 1
        assert collectives[-1] <= 4


def validated_while_training(rank: int, size: int) -> tuple[float, list[bool], Tensor]:
    bare = net()
    bare[1].eval()  # batches of a single sample have no statistics
    model = distributed.prepare_model(bare)
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), cross_entropy)
    evaluator = create_supervised_evaluator(model, {"acc": Accuracy()})
    loader = distributed.prepare_data_loader(DataLoader(data_set(7), batch_size=2), exact=True)
    modes: list[bool] = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Any) -> None:
        evaluator.run(loader)
        modes.append(model.training)

    trainer.add_metric(Average(), "loss")
    trainer.run(loader, max_epochs=2)
    return evaluator.state.metrics["acc"], modes, torch.tensor(trainer.state.metrics["loss"])  # type: ignore[return-value]


def test_an_evaluation_at_the_end_of_an_epoch_of_uneven_shards() -> None:
    results = run_ranks(validated_while_training, 3)
    assert len({(accuracy, float(loss)) for accuracy, _, loss in results}) == 1
    assert all(modes == [True, True] for _, modes, _ in results)


def evaluated_on_rank_zero(rank: int, size: int) -> tuple[dict[str, Any], int, bool]:
    """Its metrics, the collectives that were joined meanwhile, and whether the model was left as it was."""
    bare = net()
    model = distributed.prepare_model(bare)
    evaluator = create_supervised_evaluator(model, {name: make() for name, make in METRICS.items()}, distributed=False)
    before = num_joined(size)
    if rank == 0:
        evaluator.run(DataLoader(data_set(7), batch_size=2))
    num_collectives = num_joined(size) - before
    distributed.barrier()
    return dict(evaluator.state.metrics), num_collectives, model.training and bare[1].training


def test_an_evaluation_of_rank_zero_alone_goes_through_its_data_and_talks_to_nobody() -> None:
    (metrics, num_collectives, is_as_before), (nothing, _, _) = run_ranks(evaluated_on_rank_zero, 2)
    expected = by_hand(7)
    assert metrics["acc"] == expected["acc"]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-12)
    assert (nothing, num_collectives, is_as_before) == ({}, 0, True)


def refused_alone(rank: int, size: int) -> str:
    model = distributed.prepare_model(net(), "fsdp")
    with pytest.raises(ValueError, match="distributed=False") as caught:
        create_supervised_evaluator(model, distributed=False)
    return str(caught.value)


def test_a_sharded_model_is_not_evaluated_by_one_rank() -> None:
    assert "run the evaluator on every rank" in run_ranks(refused_alone, 2)[0]
