"""A sequence-parallel model with all that a training has: the weights, averages and metrics of one process."""

from math import prod
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_parameters
from tokens import IGNORED, data, trainer_of
from torch import nn
from torch.testing import assert_close

from dengine import Events, SupervisedEvents, create_supervised_evaluator, distributed
from dengine.handlers import EMA, ConsistencyCheck, LRScheduler, TerminateOnNan
from dengine.metrics import Accuracy, Loss

WIDTH = 8


class Net(nn.Module):
    """Its norms see a piece of the sequence on each rank of tp, so that gradients of theirs are partial sums there."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH)
        self.last_norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.frozen = nn.Parameter(torch.full((5,), 0.5), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> Any:
        values = self.embedding(inputs)
        values = values + self.second(self.first(self.norm(values)).relu())
        return self.head(self.last_norm(values)) + self.frozen


def plan() -> Any:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    return {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "first": ColwiseParallel(input_layouts=Shard(1)),
        "second": RowwiseParallel(output_layouts=Shard(1)),
        "last_norm": SequenceParallel(use_local_output=True),
        "head": RowwiseParallel(input_layouts=Shard(1)),
    }


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def counted(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that are not ignored."""
    is_counted = output["label"] != IGNORED
    return output["pred"][is_counted], output["label"][is_counted]


def train(model: nn.Module, batch_size: int, accumulation: int) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02, eps=1e-3)
    trainer = trainer_of(model, optimizer, accumulation)
    ema, losses = EMA(model, decay=0.5), list[float]()
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, ema)
    schedule = LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7))
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, schedule)
    trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.on(Events.EPOCH_COMPLETED, ConsistencyCheck(model, optimizer))
    trainer.add_metric(Loss(nn.functional.cross_entropy), "loss", output_transform=counted)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: losses.append(float(engine.state.metrics["loss"])))
    trainer.run(data(batch_size, WIDTH), max_epochs=2)
    found: dict[str, Any] = {"losses": losses, "lr": optimizer.param_groups[0]["lr"]}
    for name, each in (("weights", model), ("average", ema.model)):
        evaluator = create_supervised_evaluator(each)
        for metric in (Loss(nn.functional.cross_entropy), Accuracy()):
            evaluator.add_metric(metric, type(metric).__name__, output_transform=counted)
        found[f"metrics of {name}"] = dict(evaluator.run(data(batch_size, WIDTH)).metrics)
        found[name] = whole_parameters(each)
    return found


def trained(rank: int, size: int, mesh: dict[str, int]) -> list[dict[str, Any]]:
    with distributed.process_group(mesh=mesh) as here:
        return [
            train(distributed.prepare_model(net(), tensor_parallel=plan()), 8 // here.data_size, accumulation)
            for accumulation in (1, 2)
        ]


@pytest.mark.parametrize(
    "mesh",
    [{"dp": 2, "tp": 2}, {"dp_shard": 2, "tp": 2}, {"tp": 4}, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}],
    ids=str,
)
def test_all_numbers_of_a_training_are_those_of_one_process(mesh: dict[str, int]) -> None:
    expected = [train(net(), 8, accumulation) for accumulation in (1, 2)]
    for of_rank in run_ranks(trained, prod(mesh.values()), mesh, deadline_s=180):
        for found, wanted in zip(of_rank, expected, strict=True):
            assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
            assert found["lr"] == wanted["lr"]
            for kind in ("weights", "average"):
                metrics = found[f"metrics of {kind}"], wanted[f"metrics of {kind}"]
                assert metrics[0]["Accuracy"] == metrics[1]["Accuracy"]
                assert metrics[0]["Loss"] == pytest.approx(metrics[1]["Loss"], rel=1e-6)
                for name, value in wanted[kind].items():
                    assert_close(found[kind][name], value, rtol=1e-6, atol=2e-6, msg=f"{name} of the {kind}")
