"""Batches whose loading raised on some rank: the others go on, all ranks know the count, and the bound ends the run."""

import warnings
from typing import Any

import torch
from ranks import Outcome, run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dengine import create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.metrics import Average

LENGTH, BAD = 24, (1, 6, 9)  # in the batches 1 and 2 of rank 0, and 2 of rank 1


class Pictures(Dataset[Any]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        if index in BAD:
            raise OSError(f"picture {index} is truncated")
        return torch.full((2,), index / LENGTH), torch.full((1,), index / LENGTH)


def loader(max_errors: int, **options: Any) -> Any:
    data = DataLoader(Pictures(), num_workers=1, batch_size=3)
    return distributed.prepare_data_loader(data, on_error="skip", max_errors=max_errors, **options)


def train(rank: int, size: int) -> tuple[list[float], int, float, float]:
    torch.manual_seed(3)
    with distributed.process_group(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = distributed.prepare_model(nn.Linear(2, 1))
        trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss())
        state = trainer.run(loader(2), max_epochs=2)
        evaluator = create_supervised_evaluator(
            model, {"mean": Average()}, output_transform=lambda inputs, targets, pred: targets
        )
        mean = float(evaluator.run(loader(2, exact=True)).metrics["mean"])
        weights = torch.cat([each.detach().flatten() for each in model.parameters()]).tolist()
        return weights, state.data_errors, float(state.metrics["data_errors"]), mean


def bounded(rank: int, size: int) -> None:
    with distributed.process_group(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = distributed.prepare_model(nn.Linear(2, 1))
        create_supervised_trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss()).run(loader(1))


def test_other_ranks_go_on_and_all_know_the_count() -> None:
    (weights, own, total, mean), (others, own_1, total_1, mean_1) = run_ranks(train, 2, init=False)
    assert (own, own_1, total, total_1) == (4, 2, 6.0, 6.0)
    torch.manual_seed(3)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept = [each for each in range(0, LENGTH, 3) if not set(BAD) & set(range(each, each + 3))]
    for _ in range(2):
        for step in range(0, LENGTH, 6):
            samples = [each + index for each in (step, step + 3) if each in kept for index in range(3)]
            if samples:
                optimizer.zero_grad()
                inputs, targets = (
                    torch.stack(part) for part in zip(*map(Pictures().__getitem__, samples), strict=True)
                )
                nn.functional.mse_loss(model(inputs), targets).backward()
                optimizer.step()
    wanted = torch.cat([each.detach().flatten() for each in model.parameters()])
    assert weights == others
    assert torch.allclose(torch.tensor(weights), wanted, atol=1e-6)
    expected = torch.tensor([each + index for each in kept for index in range(3)]).float().mean() / LENGTH
    assert mean == mean_1
    assert abs(mean - float(expected)) < 1e-6


def test_one_error_too_many_ends_the_run_on_all_ranks() -> None:
    first, second = outcomes = run_ranks(bounded, 2, init=False, expect_failures=True)
    found: list[Outcome[None]] = outcomes
    assert found[0].error_type == "OSError"
    assert "error 2 in this pass" in first.error_message
    assert second.error_type == "RemoteRankError"
