"""No name in a checkpoint says what was compiled, and old names load: wherever in a model `torch.compile` was put."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine
from dengine.checkpoint import load, save
from dengine.checkpoint.formats.sharded.plan import read_shards
from dengine.compiled_names import without_compiled
from dengine.handlers import EMA


def build(is_compiled: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 1))
    if is_compiled:
        model[1] = torch.compile(model[1], backend="eager")
        model[2] = torch.compile(model[2], backend="eager")
    return model


def parts(is_compiled: bool) -> dict[str, Any]:
    model = build(is_compiled)
    optimizer = torch.optim.Adam(model.parameters())
    ema = EMA(model)
    for batch in (torch.ones(4, 2), torch.arange(8.0).reshape(4, 2)):
        model(batch).sum().backward()
        optimizer.step()
        ema(Engine(lambda engine, batch: None))
    return {"model": model, "optimizer": optimizer, "ema": ema}


def names_in(value: Any) -> list[str]:
    found: list[str] = []
    if isinstance(value, dict):
        found = [str(name) for name in value]
        for each in (*value.values(), *getattr(value, "__dict__", {}).values()):
            found += names_in(each)
    if isinstance(value, list):
        found = [name for each in value for name in (names_in(each) or [str(each)])]
    return found


def test_names_lose_the_wrapper_at_every_place() -> None:
    assert without_compiled("_orig_mod.layers.0._orig_mod.weight") == "layers.0.weight"
    assert without_compiled("a_orig_mod.b") == "a_orig_mod.b"
    assert without_compiled("a._orig_mod") == "a._orig_mod"


@pytest.mark.parametrize("ending", [".pt", ""])
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("is_compiled_again", [True, False])
def test_a_checkpoint_fits_a_model_that_is_compiled_elsewhere(
    tmp_path: Path, ending: str, is_compiled: bool, is_compiled_again: bool
) -> None:
    saved = parts(is_compiled)
    path = tmp_path / f"c_1{ending}"
    save(path, saved)
    states = torch.load(path, weights_only=True) if ending else read_shards(path)
    assert not [name for name in names_in(states) if "_orig_mod" in name]
    if ending:
        assert states["model"]._metadata["1.1"] == {"version": 2}
    into = parts(is_compiled_again)
    for parameter in (*into["model"].parameters(), *into["ema"].model.parameters()):
        parameter.data.zero_()
    load(path, into)
    for name in ("model", "ema"):
        mine, theirs = (
            list((each.model if name == "ema" else each).state_dict().values()) for each in (into[name], saved[name])
        )
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    mine, theirs = (each["optimizer"].state_dict()["state"] for each in (into, saved))
    assert all(torch.equal(mine[key]["exp_avg"], theirs[key]["exp_avg"]) for key in theirs)


@pytest.mark.parametrize("ending", [".pt", ""])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_an_old_checkpoint_with_the_longer_names_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, is_compiled: bool
) -> None:
    saved = parts(True)
    path = tmp_path / f"c_1{ending}"
    with monkeypatch.context() as patch:  # as it was written before
        patch.setattr("dengine.checkpoint.states.plain.without_compiled", lambda name: name)
        patch.setattr("dengine.checkpoint.formats.sharded.names.without_compiled", lambda name: name)
        patch.setattr("dengine.handlers.ema.aligned", lambda state, like: state)
        save(path, saved)
    states = torch.load(path, weights_only=True) if ending else read_shards(path)
    assert "1._orig_mod.0.weight" in states["model"]
    assert "1._orig_mod.0.weight" in states["ema"]["model"]
    into = parts(is_compiled)
    for parameter in (*into["model"].parameters(), *into["ema"].model.parameters()):
        parameter.data.zero_()
    load(path, into)
    for name in ("model", "ema"):
        mine, theirs = (
            list((each.model if name == "ema" else each).state_dict().values()) for each in (into[name], saved[name])
        )
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_average_tells_plain_names_and_takes_both() -> None:
    ema = EMA(build(True))
    state = ema.state_dict()
    assert list(state["model"]) == list(build(False).state_dict())
    plain = EMA(build(False))
    plain.load_state_dict(state)
    old: dict[str, Any] = {"num_updates": 3, "model": copy.copy(ema.model.state_dict())}
    assert any("_orig_mod" in name for name in old["model"])
    for average in (plain, ema):
        average.load_state_dict(old)
        assert average.num_updates == 3


def test_what_does_not_fit_is_named_without_the_wrapper(tmp_path: Path) -> None:
    save(tmp_path / "c_1.pt", {"model": nn.Sequential(nn.Linear(2, 3))})
    with pytest.raises(Exception, match=r"2\.weight|2\._orig_mod"):
        load(tmp_path / "c_1.pt", {"model": build(True)})


def test_two_names_that_differ_in_the_wrapper_alone_are_both_kept(tmp_path: Path) -> None:
    class Both:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {"a._orig_mod.w": 1, "a.w": 2}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    save(tmp_path / "c_1.pt", {"it": Both()})
    into = Both()
    into.state = {}
    load(tmp_path / "c_1.pt", {"it": into})
    assert into.state == {"a._orig_mod.w": 1, "a.w": 2}
