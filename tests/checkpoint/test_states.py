"""What is copied, and what is given back: all of it or nothing."""

from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine
from dengine.checkpoint import load, save
from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.catalogue.retention import is_kept, to_drop
from dengine.checkpoint.states.snapshot import HostCopy
from dengine.errors import CheckpointError


class Refusing:
    """Takes a part of the state before it refuses it."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"a": 0, "refuse": False}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = {**self.state, "a": state_dict["a"]}
        if state_dict["refuse"]:
            raise ArithmeticError("I refuse")


def stepped(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def flat(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [*model.state_dict().values()]
    states += [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return [value.clone() for value in states]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_where_one_object_refuses_none_is_changed(tmp_path: Any, order: int) -> None:
    model, optimizer = stepped(0)
    refusing = Refusing()
    refusing.state = {"a": 5, "refuse": True}
    save(tmp_path / "c_1.pt", {"model": model, "optimizer": optimizer, "it": refusing})
    model, optimizer = stepped(1)
    refusing = Refusing()
    before = flat(model, optimizer)
    into = [("model", model), ("optimizer", optimizer)]
    into.insert(order, ("it", refusing))
    with pytest.raises(CheckpointError, match="every object is as it was: ArithmeticError: I refuse"):
        load(tmp_path / "c_1.pt", dict(into))
    assert same(flat(model, optimizer), before)
    assert refusing.state["a"] == 0


def test_missing_and_extra_names_are_both_listed_and_nothing_is_changed(tmp_path: Any) -> None:
    save(tmp_path / "c_1.pt", {"model": nn.ModuleDict({"old": nn.Linear(1, 1), "both": nn.Linear(1, 1)})})
    model = nn.ModuleDict({"new": nn.Linear(1, 1), "both": nn.Linear(1, 1)})
    before = model["both"].weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"(?s)new\.weight.*old\.weight"):
        load(tmp_path / "c_1.pt", {"model": model})
    assert torch.equal(model["both"].get_parameter("weight"), before)
    with pytest.raises(CheckpointError, match="there is no modell in it; it holds model"):
        load(tmp_path / "c_1.pt", {"modell": model})


def test_an_engine_that_refuses_is_unchanged_and_begins_afresh(tmp_path: Any) -> None:
    class Wrong:
        def state_dict(self) -> dict[str, Any]:
            return {"iteration": 3}

        def load_state_dict(self, state_dict: Any) -> None: ...

    save(tmp_path / "c_1.pt", {"trainer": Wrong(), "model": nn.Linear(1, 1)})
    trainer, model = Engine(lambda engine, batch: batch), nn.Linear(1, 1)
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match="lacks"):
        load(tmp_path / "c_1.pt", {"trainer": trainer, "model": model})
    assert torch.equal(model.weight, before)
    assert trainer.run([1, 2]).iteration == 2


def test_a_host_copy_shares_nothing_with_what_goes_on() -> None:
    tensor = torch.arange(6.0)
    inner = {"list": [1, {"deep": [2]}], "exp": tensor[2:4]}
    states = {
        "a": tensor,
        "view": tensor.reshape(2, 3).t(),
        "inner": inner,
        "empty": torch.empty(0),
        "n": torch.empty(0),
    }
    copied = HostCopy().take(states)
    tensor.zero_()
    inner["list"][1]["deep"].append(3)
    assert copied["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copied["view"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["inner"]["exp"].tolist() == [2, 3]
    assert copied["inner"]["list"] == [1, {"deep": [2]}]


def test_a_host_copy_uses_its_memory_again_and_keeps_tied_weights_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    copies = HostCopy()
    first = copies.take({"model": model.state_dict()})["model"]
    addresses = {name: value.data_ptr() for name, value in first.items()}
    assert addresses["0.weight"] == addresses["1.weight"] != model[0].weight.data_ptr()
    assert first._metadata.keys() == model.state_dict()._metadata.keys()  # type: ignore[attr-defined]
    with torch.no_grad():
        model[0].weight.fill_(4)
    second = copies.take({"model": model.state_dict()})["model"]
    assert {name: value.data_ptr() for name, value in second.items()} == addresses
    assert bool((second["0.weight"] == 4).all())


def test_a_host_copy_of_other_shapes_is_right_too() -> None:
    copies = HostCopy()
    copies.take({"a": torch.ones(3), "b": torch.ones(4)})
    taken = copies.take({"a": torch.full((2, 2), 7.0), "b": torch.arange(3), "c": torch.ones(1).half()})
    assert taken["a"].tolist() == [[7, 7], [7, 7]]
    assert taken["b"].tolist() == [0, 1, 2]
    assert taken["c"].dtype == torch.float16


def entry(step: int, sequence: int, score: float | None = None) -> Entry:
    return Entry(f"c_{step}.pt", "c", step, score, None if score is None else "s", sequence, (), 1, {})


def test_what_was_saved_last_is_kept_even_where_a_later_step_is_there() -> None:
    old = [entry(20, 2), entry(30, 3)]
    assert to_drop(old, entry(25, 4), 2) == [old[1]]  # ahead of where the run has gone back to
    assert to_drop(old, entry(5, 4), 1) == [old[1], old[0]] or to_drop(old, entry(5, 4), 1) == [old[0], old[1]]
    assert to_drop(old, entry(30, 4), 2) == []  # the same file again


def test_of_two_with_one_score_the_older_stays_and_nan_never_enters() -> None:
    kept = [entry(1, 1, 0.5), entry(2, 2, 0.25)]
    assert not is_kept(0.25, kept, 2)
    assert not is_kept(float("nan"), [], 2)
    assert is_kept(float("-inf"), [], 2)
    assert to_drop(kept, entry(3, 3, 0.5), 2) == [kept[1]]
