"""`load(path, into, partial=True)` takes what fits by name and shape, and says what was left out on either side."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine
from dengine.checkpoint import LeftOut, load, save
from dengine.errors import CheckpointError
from dengine.handlers import EMA

ENDINGS = pytest.mark.parametrize("ending", [".pt", ""])


def model_of(value: float, head: int = 2, **more: nn.Module) -> nn.ModuleDict:
    model = nn.ModuleDict({"body": nn.Linear(2, 3), "norm": nn.BatchNorm1d(3), "head": nn.Linear(3, head), **more})
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


@ENDINGS
def test_another_head_is_left_as_it_is_and_told_on_both_sides(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c_1{ending}"
    save(path, {"model": model_of(1, old=nn.Linear(1, 1))})
    model = model_of(5, head=4, new=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"size mismatch|Missing"):
        load(path, {"model": model})
    left = load(path, {"model": model}, partial=True)
    assert isinstance(left, LeftOut)
    head = ["model/head.weight", "model/head.bias"]
    assert sorted(left.missing_keys) == sorted([*head, "model/new.weight", "model/new.bias"])
    assert sorted(left.unexpected_keys) == sorted([*head, "model/old.weight", "model/old.bias"])
    assert bool((model["body"].weight == 1).all())
    assert model["head"].weight.shape == (4, 3)
    for name in ("head", "new"):
        assert all(bool((parameter == 5).all()) for parameter in model[name].parameters())


@ENDINGS
def test_where_all_fits_nothing_is_left_out(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c_1{ending}"
    model = model_of(1)
    optimizer = torch.optim.Adam(model.parameters())
    objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": EMA(model)}
    objects["trainer"] = Engine(lambda engine, batch: None)
    save(path, objects)
    assert load(path, objects, partial=True) == LeftOut([], [])
    assert load(path, objects) is None


@ENDINGS
def test_names_on_one_side_only_are_left_out_as_a_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c_1{ending}"
    model = model_of(1)
    save(path, {"model": model, "teacher": model_of(2)})
    into = model_of(5)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(into.parameters(), lr=1.0), 1)
    left = load(path, {"model": into, "scheduler": scheduler}, partial=True)
    assert left == LeftOut(["scheduler"], ["teacher"])
    assert bool((into["head"].weight == 1).all())
    assert load(path, {"student": into}, partial=True) == LeftOut(["student"], ["model", "teacher"])


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@ENDINGS
@pytest.mark.parametrize("head", [2, 4])
def test_an_optimizer_is_taken_or_left_as_a_whole(tmp_path: Path, ending: str, head: int) -> None:
    path = tmp_path / f"c_1{ending}"
    model = model_of(1)
    save(path, {"model": model, "optimizer": stepped(model)})
    into = model_of(5, head)
    optimizer = torch.optim.Adam(into.parameters(), lr=0.1)
    left = load(path, {"model": into, "optimizer": optimizer}, partial=True)
    assert left is not None
    assert ("optimizer" in left.missing_keys) == (head == 4)
    assert ("optimizer" in left.unexpected_keys) == (head == 4)
    assert optimizer.param_groups[0]["lr"] == (0.1 if head == 4 else 0.5)
    stepped(into)
    for parameter in into.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # with a state of the right shapes


@ENDINGS
def test_fewer_parameters_leave_the_optimizer_out(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c_1{ending}"
    model = model_of(1)
    save(path, {"model": model, "optimizer": stepped(model)})
    into = model_of(5)
    optimizer = torch.optim.Adam(into["body"].parameters(), lr=0.1)
    left = load(path, {"model": into, "optimizer": optimizer}, partial=True)
    assert left == LeftOut(["optimizer"], ["optimizer"])


@ENDINGS
def test_an_average_takes_what_fits_too(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c_1{ending}"
    save(path, {"ema": EMA(model_of(1))})
    ema = EMA(model_of(5, head=3))
    left = load(path, {"ema": ema}, partial=True)
    head = ["ema/model/head.weight", "ema/model/head.bias"]
    assert left == LeftOut(head, head)
    average: Any = ema.model
    assert bool((average["body"].weight == 1).all())
    assert bool((average["head"].weight == 5).all())


@ENDINGS
def test_a_compiled_part_fits_by_its_plain_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c_1{ending}"
    save(path, {"model": model_of(1)})
    into = model_of(5, head=4)
    into["body"] = torch.compile(into["body"], backend="eager")
    left = load(path, {"model": into}, partial=True)
    assert left == LeftOut(["model/head.weight", "model/head.bias"], ["model/head.weight", "model/head.bias"])
    assert bool((into["body"].weight == 1).all())


@ENDINGS
def test_what_refuses_all_the_same_changes_nothing(tmp_path: Path, ending: str) -> None:
    class Refusing:
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

        def load_state_dict(self, state: Any) -> None:
            raise ArithmeticError("no")

    path = tmp_path / f"c_1{ending}"
    save(path, {"model": model_of(1), "it": Refusing()})
    model = model_of(5, head=4)
    with pytest.warns(UserWarning, match="does not take back"), pytest.raises(CheckpointError, match="ArithmeticError"):
        load(path, {"model": model, "it": Refusing()}, partial=True)
    assert all(bool((parameter == 5).all()) for parameter in model.parameters())
