"""The average, known by hand; and that nothing in it waits for a device."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dengine import Engine, Events
from dengine.handlers import EMA

ENGINE = Engine(lambda engine, batch: None)


def filled(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def test_the_shares_of_the_calls_are_those_of_an_exponential_mean() -> None:
    model = nn.Linear(2, 2)
    first = [parameter.clone() for parameter in model.parameters()]
    ema = EMA(model, decay=0.75)
    for averaged, parameter in zip(ema.model.parameters(), first, strict=True):
        assert torch.equal(averaged, parameter)
    expected = 4.0
    for value in (4.0, 8.0, -1.0):
        filled(model, value)
        ema(ENGINE)
        expected = 0.75 * expected + 0.25 * value
        for averaged in ema.model.parameters():
            torch.testing.assert_close(averaged, torch.full_like(averaged, expected))
    assert ema.num_updates == 3


def test_floating_buffers_are_averaged_and_others_copied() -> None:
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.5)
    for value in (1, 2, 5):
        filled(model, value)
        ema(ENGINE)
    assert ema.model.running_mean.tolist() == [3.25, 3.25]
    assert ema.model.num_batches_tracked.item() == 5
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [5, 5]


def test_the_copy_is_one_of_its_own_in_eval_mode_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    ema = EMA(model)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.data_ptr() for tensor in model.parameters()}.isdisjoint(
        tensor.data_ptr() for tensor in ema.model.parameters()
    )


def test_mixed_dtypes_tied_weights_and_a_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16())
    model[1].weight = model[0].weight
    ema = EMA(torch.compile(model), decay=0.5)  # type: ignore[arg-type]
    for value in (1, 2):
        filled(model, value)
        ema(ENGINE)
    assert {value.dtype for value in ema.model.parameters()} == {torch.float32, torch.float64, torch.bfloat16}
    assert all(value.eq(1.5).all() for value in ema.model.parameters())
    assert ema.model[1].weight is ema.model[0].weight
    assert list(ema.model.state_dict()) == list(model.state_dict())


def test_weights_that_were_replaced_are_found() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.5)
    model.load_state_dict({"weight": torch.tensor([[7.0]])}, assign=True)
    ema(ENGINE)
    assert ema.model.weight.item() == 7


def test_a_call_waits_for_no_device() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to("meta")  # whatever reads a value raises
    ema = EMA(model)
    seen: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Operations():
        ema(ENGINE)
        ema(ENGINE)
    assert seen.count("_foreach_lerp_") == 1
    assert "_local_scalar_dense" not in seen
    assert len(seen) < 30


def test_a_resumed_average_goes_on_as_one_never_interrupted() -> None:
    values = [1.0, 5.0, 2.0, 8.0]
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    whole = EMA(model, decay=0.9)
    for value in values:
        filled(model, value)
        whole(ENGINE)
    first, second = EMA(model, decay=0.9), EMA(model, decay=0.9)
    for ema, part in ((first, values[:2]), (second, values[2:])):
        for value in part:
            filled(model, value)
            ema(ENGINE)
        if ema is first:
            second.load_state_dict(first.state_dict())
    for ours, theirs in zip(second.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.num_updates == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("num_updates"), "entries 'num_updates' and 'model', but got ['model']"),
        (lambda state: state.update(num_updates=-1), "num_updates=-1 must be at least 0"),
        (lambda state: state.update(num_updates=None), "num_updates=None must be a whole number"),
        (lambda state: state.update(model=3), "'model' in the state of EMA must be a dict"),
        (lambda state: state["model"].pop("bias"), "lacks 'bias'"),
        (lambda state: state["model"].update(x=1), "has the unknown entry 'x'"),
        (lambda state: state["model"].update(bias=torch.zeros(3)), "'bias' in the state of EMA is (3,), but"),
        (lambda state: state["model"].update(bias=1.0), "'bias' in the state of EMA is float"),
    ],
)  # fmt: skip
def test_a_wrong_state_is_named_and_nothing_changes(change: Any, message: str) -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model)
    state = EMA(nn.Linear(2, 2)).state_dict()
    state["num_updates"] = 5
    before = [value.clone() for value in ema.model.parameters()]
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        ema.load_state_dict(state)
    assert ema.num_updates == 0
    assert all(torch.equal(*pair) for pair in zip(ema.model.parameters(), before, strict=True))


def test_it_can_begin_late_and_be_saved_and_read_without_a_pickle(tmp_path: Any) -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.5)
    trainer = Engine(lambda engine, batch: filled(model, batch))
    trainer.on(Events.ITERATION_COMPLETED(after=2), ema)
    trainer.run([1.0, 2.0, 3.0, 5.0])
    assert ema.model.weight.item() == 4
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    assert torch.load(tmp_path / "ema.pt", weights_only=True)["num_updates"] == 2


@pytest.mark.parametrize("decay", [1, 1.5, -0.1, float("nan"), True, "0.9"])
def test_a_wrong_decay_is_named(decay: Any) -> None:
    with pytest.raises(ValueError, match="must be a number from 0 to below 1"):
        EMA(nn.Linear(1, 1), decay)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        EMA([1])  # type: ignore[arg-type]
