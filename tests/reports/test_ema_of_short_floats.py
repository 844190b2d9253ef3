"""The average of weights in 16 bits is kept in 32: a share of a thousandth is below the last bit of the former."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.handlers import EMA, Checkpoint

ENGINE = Engine(lambda engine, batch: None)
SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def filled(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def average(values: list[float], decay: float) -> float:
    expected = values[0]
    for value in values[1:]:
        expected = decay * expected + (1 - decay) * value
    return expected


@SHORT
def test_a_decay_near_1_moves_it(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).to(dtype)
    ema = EMA(model, decay=0.999)
    values = [1.0] + [2.0] * 500
    for value in values:
        filled(model, value)
        ema(ENGINE)
    expected = torch.tensor(average(values, 0.999))
    for tensor in (*ema.model.parameters(), *(each for each in ema.model.buffers() if each.is_floating_point())):
        assert tensor.dtype == dtype
        assert (tensor == expected.to(dtype)).all()
    for name, tensor in ema.state_dict()["model"].items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
            torch.testing.assert_close(tensor, expected.expand(tensor.shape), atol=1e-5, rtol=0)


@SHORT
@pytest.mark.parametrize("cut", [1, 150, 299])
def test_a_resumed_average_is_the_uninterrupted_one_to_the_last_bit(
    dtype: torch.dtype, cut: int, tmp_path: Path
) -> None:
    def run(folder: Path, until: int) -> EMA:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(dtype)
        model[1].weight = model[0].weight
        ema = EMA(model, decay=0.999)
        trainer = Engine(lambda engine, batch: filled(model, batch))
        trainer.on(Events.ITERATION_COMPLETED, ema)
        objects: dict[str, Any] = {"trainer": trainer, "ema": ema, "model": model}
        trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint(objects, folder))
        Checkpoint.resume(folder, objects)
        trainer.run([1.0 + index % 7 for index in range(300)], max_iterations=until)
        return ema

    whole = run(tmp_path / "whole", 300)
    run(tmp_path / "parts", cut)
    second = run(tmp_path / "parts", 300)
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours["num_updates"] == theirs["num_updates"] == 300
    for name, tensor in ours["model"].items():
        assert torch.equal(tensor, theirs["model"][name]), name
    assert second.model[1].weight is second.model[0].weight


@SHORT
def test_a_state_of_16_bits_is_taken_and_a_state_is_no_view_that_goes_on(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1, bias=False).to(dtype)
    ema = EMA(model, decay=0.5)
    ema.load_state_dict({"num_updates": 3, "model": {"weight": torch.full((1, 1), 2.0, dtype=dtype)}})
    assert ema.model.weight.item() == 2
    filled(model, 4.0)
    ema(ENGINE)
    assert ema.model.weight.item() == 3
    given = torch.full((1, 1), 8.0)
    ema.load_state_dict({"num_updates": 3, "model": {"weight": given}})
    ema(ENGINE)
    assert given.item() == 8
    assert ema.model.weight.item() == 6


def test_of_a_model_in_float32_nothing_more_is_kept() -> None:
    model = nn.Linear(1, 1)
    ema = EMA(model)
    ema(ENGINE)
    state = ema.state_dict()["model"]
    assert all(state[name].data_ptr() == value.data_ptr() for name, value in ema.model.named_parameters())


def test_the_copy_may_be_moved_to_float32() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    ema = EMA(model, decay=0.999)
    filled(model, 1.0)
    ema(ENGINE)
    ema.model.float()
    filled(model, 2.0)
    ema(ENGINE)
    torch.testing.assert_close(ema.model.weight.item(), 1.001)
