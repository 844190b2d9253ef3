"""Everything of dengine.distributed in a run of one process, without a process group."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dengine import Engine, Events, distributed
from dengine.errors import RankZeroCollectiveError
from dengine.metrics import Accuracy


def test_plain_python_is_a_world_of_one_and_makes_no_group() -> None:
    with distributed.process_group() as world:
        assert (world.rank, world.size, world.local_rank, world.launcher) == (0, 1, 0, "single")
        assert distributed.world() is world
        assert not dist.is_initialized()
    assert distributed.world().size == 1


def test_the_world_is_frozen() -> None:
    with pytest.raises(AttributeError):
        distributed.world().rank = 1


def test_a_timeout_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout=0 must be"), distributed.process_group(timeout=0):
        pass


def test_the_world_is_left_by_an_exception_too() -> None:
    with pytest.raises(KeyError), distributed.process_group() as inner:
        raise KeyError
    assert distributed.world() is not inner


@pytest.mark.parametrize("op", ["sum", "min", "max", "mean"])
def test_values_come_back_as_they_went_in(op: str) -> None:
    value = {"a": 1.5, "b": [torch.ones(2, dtype=torch.float32), {"c": torch.tensor(2.0, dtype=torch.float16)}]}
    reduced = distributed.all_reduce(value, op)  # type: ignore[arg-type]
    assert reduced["a"] == 1.5
    assert type(reduced["a"]) is float
    assert reduced["b"][0].tolist() == [1.0, 1.0]
    assert reduced["b"][1]["c"].dtype == torch.float16
    assert reduced["b"][0] is not value["b"][0]


def test_whole_numbers_stay_whole() -> None:
    assert distributed.all_reduce({"n": 2**62 + 1, "flag": True}, "max") == {"n": 2**62 + 1, "flag": True}


@pytest.mark.parametrize(
    ("value", "op", "error", "message"),
    [
        (1, "mean", ValueError, "mean of whole numbers"),
        (True, "sum", ValueError, "sum of booleans"),
        (1.0, "avg", ValueError, "op='avg' must be one of sum, mean, min, max"),
        ("a", "sum", TypeError, "numbers and tensors"),
    ],
)
def test_what_cannot_be_reduced_is_said(value: object, op: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        distributed.all_reduce(value, op)  # type: ignore[arg-type]


def test_objects_and_barriers_are_there_for_one() -> None:
    assert distributed.all_gather_object("x") == ["x"]
    assert distributed.broadcast_object({"x": 1}) == {"x": 1}
    distributed.barrier("nowhere")
    with distributed.rank_zero_first():
        pass


def test_the_body_of_rank_zero_first_may_raise() -> None:
    with pytest.raises(OSError, match="full"), distributed.rank_zero_first():
        raise OSError("full")


@pytest.mark.parametrize(
    "collective",
    [
        lambda: distributed.all_reduce(1.0),
        lambda: distributed.all_gather_object(1),
        lambda: distributed.broadcast_object(1),
        lambda: distributed.barrier("here"),
        lambda: Engine(lambda engine, batch: batch).run([1]),
        lambda: distributed.evaluating(nn.BatchNorm1d(2)).__enter__(),
    ],
)
def test_a_collective_in_a_rank_zero_handler_is_refused_and_the_handler_named(collective: object) -> None:
    @distributed.rank_zero_only
    def save_samples() -> None:
        collective()

    with pytest.raises(RankZeroCollectiveError, match="save_samples runs on rank 0 only"):
        save_samples()
    distributed.barrier("outside of it again")


def test_an_evaluation_of_rank_zeros_own_is_no_collective() -> None:
    evaluator = Engine(lambda engine, batch: (torch.tensor([batch]), torch.tensor([batch])), distributed=False)
    evaluator.add_metric(Accuracy(), "acc")
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1, 2]) and None, rank_zero_only=True)
    trainer.run([0])
    assert evaluator.state.metrics["acc"] == 1.0


def test_a_model_in_one_process_is_the_plain_module() -> None:
    model = nn.Linear(2, 2)
    for strategy in ("auto", "ddp", "fsdp", "none"):
        assert distributed.prepare_model(model, strategy) is model


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("no model",), {}, TypeError, "takes a torch.nn.Module, but got str"),
        ((nn.Linear(1, 1), "dpp"), {}, ValueError, "strategy='dpp' must be one of auto, ddp, fsdp, none"),
        ((nn.Linear(1, 1), "none"), {"static_graph": True}, ValueError, "takes no options, but got static_graph"),
        ((nn.Linear(1, 1), "ddp"), {"blocks": (nn.Linear,)}, ValueError, "strategy='ddp' takes none"),
    ],
)
def test_wrong_arguments_of_prepare_model_are_named(
    arguments: tuple[object, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        distributed.prepare_model(*arguments, **options)  # type: ignore[arg-type]


def test_compile_is_unwrapped() -> None:
    model = nn.Linear(2, 2)
    assert distributed.unwrap_model(torch.compile(model)) is model  # type: ignore[arg-type]


def test_evaluating_puts_every_modules_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model.train()
    model[1].eval()  # a frozen layer
    with pytest.raises(KeyError), distributed.evaluating(model) as net:
        assert net is model
        assert not any(module.training for module in net.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]


def test_importing_starts_nothing_and_loads_no_package_that_is_not_used() -> None:
    code = """
import sys, threading
import dengine
assert "torch" not in sys.modules, "the names are lazy"
import torch
loaded_by_torch = set(sys.modules)
from dengine import Engine, Events, distributed, metrics, handlers, errors
import torch.distributed
assert not torch.distributed.is_initialized()
assert threading.active_count() == 1
unwanted = {"accelerate", "torchmetrics", "tqdm", "tensorboard", "matplotlib", "torch.distributed.checkpoint"}
found = unwanted & (set(sys.modules) - loaded_by_torch)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
