"""A bit that flips in a gradient of one rank: all ranks stop together, with the name and the rank."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Engine, ReplayError, create_supervised_trainer, distributed
from dengine.handlers import Replay

Batch = tuple[Tensor, Tensor]
Found = tuple[str | None, int | None, int]


def data_of(rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)) for _ in range(8)]


def flipped(gradient: Tensor) -> Tensor:
    wrong = gradient.clone()
    wrong.view(torch.int32).view(-1)[0] ^= 1
    return wrong


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def found_by(trainer: Engine, model: nn.Module, rank: int) -> Found:
    Replay(model, every=3).attach(trainer)
    torch.manual_seed(rank)
    try:
        trainer.run(data_of(rank))
    except ReplayError as error:
        return error.parameter, error.rank, trainer.state.iteration
    return None, None, trainer.state.iteration


def by_hand(model: nn.Module, *, flips_after: bool) -> Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done: list[int] = []

    def train_step(engine: Engine, batch: Batch) -> None:
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        if flips_after and engine.state.iteration == 6 and not done:
            done.append(1)
            bias: Any = dict(distributed.unwrap_model(model).named_parameters())["1.bias"]
            bias.grad.copy_(flipped(bias.grad))
        optimizer.step()

    return Engine(train_step)


def supervised(model: nn.Module, **options: Any) -> Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return create_supervised_trainer(model, optimizer, cross_entropy, **options)


def hooked(model: nn.Module, *, at: int) -> None:
    """Flip a bit of this rank's gradient in its `at`-th backward pass."""
    calls: list[int] = []

    def hook(gradient: Tensor) -> Tensor | None:
        calls.append(1)
        return flipped(gradient) if len(calls) == at else None

    bias = dict(distributed.unwrap_model(model).named_parameters())["4.bias"]
    bias.register_hook(hook)


def cases(rank: int, size: int) -> dict[str, Found]:
    found = {}
    for strategy in ("ddp", "fsdp"):
        model = distributed.prepare_model(net(), strategy)
        found[f"{strategy}, nothing"] = found_by(supervised(model), model, rank)
        model = distributed.prepare_model(net(), strategy)
        accumulating = supervised(model, gradient_accumulation_steps=2, guard=True)
        found[f"{strategy}, accumulation"] = found_by(accumulating, model, rank)
    for at in (3, 4):  # the rehearsal of iteration 3, and the step itself
        model = distributed.prepare_model(net())
        if rank == size - 1:
            hooked(model, at=at)
        found[f"own gradient, {at}"] = found_by(supervised(model), model, rank)
    model = distributed.prepare_model(net())
    found["averaged gradient"] = found_by(by_hand(model, flips_after=rank == 0), model, rank)
    return found


def weights_and_buffers(rank: int, size: int) -> list[bool]:
    """Whether each is the same with and without a replay of each step of an accumulation, on this rank."""

    def trained(*, replays: bool) -> list[Tensor]:
        model = distributed.prepare_model(net())
        trainer = supervised(model, gradient_accumulation_steps=2)
        if replays:
            Replay(model, every=1).attach(trainer)
        torch.manual_seed(rank)
        trainer.run(data_of(rank))
        return [*distributed.unwrap_model(model).state_dict().values(), torch.rand(2)]

    return [torch.equal(*pair) for pair in zip(trained(replays=True), trained(replays=False), strict=True)]


def test_a_replay_leaves_no_trace_on_any_rank() -> None:
    assert all(map(all, run_ranks(weights_and_buffers, 2)))


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_stop_together_with_the_name_and_the_rank(size: int) -> None:
    for found in run_ranks(cases, size):
        for name in ("ddp, nothing", "ddp, accumulation", "fsdp, nothing", "fsdp, accumulation"):
            assert found[name] == (None, None, 8), name
        assert found["own gradient, 3"] == ("4.bias", size - 1, 3)
        assert found["own gradient, 4"] == ("4.bias", size - 1, 3)
        assert found["averaged gradient"] == ("1.bias", 0, 6)
