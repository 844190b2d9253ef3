"""Batches of None on some ranks, or on all: nobody waits for them, and the step is that of what is left."""

from typing import Any

import pytest
import torch
from ranks import Outcome, run_ranks
from torch import nn

from dengine import Engine, create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.engine import Absent
from dengine.metrics import Average
from dengine.supervised.trainer import SupervisedEvents

LEFT_OUT = {  # the iterations whose batch is None, for each rank; number 4 on all
    0: (1, 4, 6, 7),
    1: (2, 4, 6),
    2: (2, 4, 5),
}
NUM_BATCHES = 7


def batch(rank: int, number: int) -> Any:
    size = 1 + (rank + number) % 3
    return torch.full((size, 2), 0.1 * (rank + number)), torch.ones(size, 1) * number / 7


def batches(rank: int) -> list[Any]:
    return [None if number in LEFT_OUT[rank] else batch(rank, number) for number in range(1, NUM_BATCHES + 1)]


def model_of(strategy: str) -> nn.Module:
    torch.manual_seed(3)
    return distributed.prepare_model(nn.Linear(2, 1), strategy=strategy)  # type: ignore[arg-type]


def trained(strategy: str, rank: int, num_batches: int, at: int | None) -> tuple[list[float], list[int]]:
    """The weights after two epochs, and the iterations in which the optimizer stepped; or after a resume `at`."""
    model = model_of(strategy)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, nn.MSELoss(), gradient_accumulation_steps=num_batches)
    steps: list[int] = []
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: steps.append(engine.state.iteration))
    if at is not None:
        trainer.run(batches(rank), max_epochs=2, max_iterations=at)
        trainer.load_state_dict(trainer.state_dict())
    trainer.run(batches(rank), max_epochs=2)
    weights = distributed.unwrap_model(model).state_dict()
    full = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in weights.values()]
    return torch.cat([each.flatten() for each in full]).tolist(), steps


def evaluated(strategy: str, rank: int) -> tuple[float, int]:
    evaluator = create_supervised_evaluator(
        model_of(strategy), {"mean": Average()}, output_transform=lambda inputs, targets, pred: targets
    )
    state = evaluator.run(batches(rank))
    return float(state.metrics["mean"]), state.iteration


def joined(rank: int) -> list[float]:
    """A step of the user's own that holds a collective, in a joined engine."""
    found: list[float] = []

    def step(engine: Engine, batch: Any) -> None:
        is_absent = isinstance(batch, Absent)
        inputs, _ = batch.spare if is_absent else batch
        found.append(distributed.all_reduce(0.0 if is_absent else float(len(inputs)), "sum"))

    Engine(step, joined=True).run(batches(rank))
    return found


def nothing_at_all(rank: int, size: int) -> None:
    with distributed.process_group():
        engine = Engine(lambda engine, batch: distributed.all_reduce(1.0, "sum"), joined=True)
        engine.run([None, None] if rank == 1 else [1, 2])


def everything(rank: int, size: int) -> dict[str, Any]:
    with distributed.process_group():
        return {
            "ddp": trained("ddp", rank, 1, None),
            "resumed": trained("ddp", rank, 1, 4),
            "accumulated": trained("ddp", rank, 2, None),
            "sharded": trained("fsdp", rank, 1, None),
            "evaluated": [evaluated(strategy, rank) for strategy in ("ddp", "fsdp")],
            "joined": joined(rank),
        }


def alone(size: int, num_batches: int) -> tuple[torch.Tensor, list[int]]:
    """The oracle: one process, whose batches are all that the ranks have left."""
    torch.manual_seed(3)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    steps = []
    for epoch in range(2):
        for start in range(0, NUM_BATCHES, num_batches):
            numbers = range(start, min(start + num_batches, NUM_BATCHES))
            left = [each for rank in range(size) for number in numbers if (each := batches(rank)[number]) is not None]
            if left:
                inputs, targets = (torch.cat(part) for part in zip(*left, strict=True))
                optimizer.zero_grad()
                nn.functional.mse_loss(model(inputs), targets).backward()
                optimizer.step()
                steps.append(epoch * NUM_BATCHES + numbers[-1] + 1)
    return torch.cat([each.detach().flatten() for each in model.parameters()]), steps


@pytest.mark.parametrize("size", [2, 3])
def test_batches_of_none_hold_nobody_up_and_leave_no_trace(size: int) -> None:
    found = run_ranks(everything, size, init=False)
    targets = [each[1] for rank in range(size) for each in batches(rank) if each is not None]
    for of in found:
        for name, num_batches in (("ddp", 1), ("resumed", 1), ("accumulated", 2), ("sharded", 1)):
            weights, steps = alone(size, num_batches)
            assert of[name][1] == steps, name
            assert torch.allclose(torch.tensor(of[name][0]), weights, atol=1e-5), name
            assert of[name][0] == found[0][name][0], name
        assert of["resumed"] == of["ddp"]
        for mean, num_iterations in of["evaluated"]:
            assert (mean, num_iterations) == (pytest.approx(float(torch.cat(targets).mean())), NUM_BATCHES)
        assert of["joined"] == [
            sum(len(each[number][0]) for each in map(batches, range(size)) if each[number] is not None)
            for number in range(NUM_BATCHES)
        ]


def test_a_rank_that_has_nothing_to_take_part_with_says_so() -> None:
    outcomes: list[Outcome[None]] = run_ranks(nothing_at_all, 2, init=False, expect_failures=True)
    assert outcomes[1].error_type == "RuntimeError"
    assert "All batches that this list gave on this rank are None" in outcomes[1].error_message
    assert outcomes[0].error_type == "RemoteRankError"
