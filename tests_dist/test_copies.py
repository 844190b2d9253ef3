"""Copies of a model's pieces are compared on every mesh, and before each save: what differs is named, and not saved."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from dengine import Engine, Events, distributed
from dengine.dtensor import local_part
from dengine.handlers import Checkpoint, ConsistencyCheck, Preemption

WIDTH = 8


def nothing(engine: Engine, batch: Any) -> None:
    return None


def net(width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, width), nn.BatchNorm1d(width), nn.Linear(width, WIDTH))


def stage(place: int) -> nn.Module:
    """The stages of a pipeline have other names, and not as many."""
    torch.manual_seed(place)
    return Named(["first"] if place == 0 else ["second", "third"])


class Named(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            values = layer(values)
        return values


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, WIDTH)).sum().backward()
    optimizer.step()
    return optimizer


def diverge(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        values = dict(distributed.unwrap_model(model).state_dict(keep_vars=True))
        local_part(values[name]).view(-1)[0] += 1


def counted(patch: pytest.MonkeyPatch) -> list[str]:
    """The collectives of torch that are called from now on."""
    calls: list[str] = []
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list"):
        call = getattr(dist, name)

        def counting(*arguments: Any, call: Any = call, name: str = name, **options: Any) -> Any:
            calls.append(name)
            return call(*arguments, **options)

        patch.setattr(dist, name, counting)
    return calls


def on_mesh(rank: int, mesh: dict[str, int], changed: dict[int, str], what: str = "parameter") -> list[str]:
    """What the check says of a model on `mesh` before, and after some ranks have changed the parameter named."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    with distributed.process_group(mesh=mesh, timeout=300) as here:
        options: dict[str, Any] = {}
        model: nn.Module = net()
        if "tp" in mesh:
            model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
            options["tensor_parallel"] = {"1": ColwiseParallel()}
        if "pp" in mesh:
            model, options["parts"] = stage(here.coordinates["pp"]), "pp"
        if "ep" in mesh:  # experts have the same names, and are others on each rank of ep
            torch.manual_seed(here.coordinates["ep"])
            experts = distributed.prepare_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), parts="ep")
            model = nn.Sequential(net(), experts)
        model = distributed.prepare_model(model, **options)
        optimizer = stepped(model)
        check = ConsistencyCheck(model, optimizer)
        engine = Engine(nothing)
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch)
            seen = [message(lambda: check(engine)) + f"{len(calls) - 1 or ''}"]
        if rank in changed and what == "parameter":
            diverge(model, changed[rank])
        elif rank in changed:
            parameter = dict(distributed.unwrap_model(model).named_parameters())[changed[rank]]
            optimizer.state[parameter]["exp_avg"].mul_(2)
        seen.append(message(lambda: check(engine)))
        return seen


CASES: dict[str, tuple[dict[str, int], dict[int, str], str]] = {
    # A replica of HSDP: ranks 1 and 3 have the second half, rank 3 is wrong; there are two copies.
    "hsdp": ({"dp_replicate": 2, "dp_shard": 2}, {3: "2.weight"}, "parameter"),
    "hsdp state": ({"dp_replicate": 2, "dp_shard": 2}, {2: "2.weight"}, "state"),
    "hsdp buffer": ({"dp_replicate": 2, "dp_shard": 2}, {2: "1.running_mean"}, "parameter"),
    # Cut over tp: two copies over dp. Not cut: four copies.
    "tp cut": ({"dp": 2, "tp": 2}, {1: "1.weight"}, "parameter"),
    "tp copied": ({"dp": 2, "tp": 2}, {1: "0.weight"}, "parameter"),
    "tp tied": ({"dp": 2, "tp": 2}, {1: "0.weight", 3: "0.weight"}, "parameter"),
    "pp": ({"pp": 2, "dp": 2}, {3: "third.bias"}, "parameter"),
    "pp state": ({"pp": 2, "dp": 2}, {0: "first.weight"}, "state"),
    "pp alone": ({"pp": 4}, {2: "third.bias"}, "parameter"),
    "pp sharded": ({"pp": 2, "dp_shard": 2}, {2: "third.bias"}, "parameter"),
    "ep": ({"dp": 2, "ep": 2}, {3: "1.0.weight"}, "parameter"),
    "ep shared": ({"dp": 2, "ep": 2}, {3: "0.0.weight"}, "parameter"),
    "ddp": ({"dp": 4}, {2: "0.weight"}, "parameter"),
}


def on_all(rank: int, size: int) -> dict[str, list[str]]:
    return {name: on_mesh(rank, *case) for name, case in CASES.items()}


def test_copies_are_compared_on_every_mesh_and_parts_among_their_replicas_only() -> None:
    kind, tie = "ConsistencyError: The parameters differ between ranks: ", "There is no majority among the copies"
    for seen in run_ranks(on_all, 4, init=False, deadline_s=150):
        assert [before for before, _ in seen.values()] == [""] * len(CASES), seen  # one collective, and no difference
        told = {name: after for name, (_, after) in seen.items()}
        assert told["hsdp"].startswith(
            f"{kind}'2.weight' of rank 3 (dp_replicate=1, dp_shard=1) is not that of rank 1 (dp_replicate=0, "
            f"dp_shard=1). {tie}"
        )
        assert told["hsdp state"].startswith(
            f"{kind}'optimizer.state.4.exp_avg' of rank 2 (dp_replicate=1, dp_shard=0) is not that of rank 0 "
            f"(dp_replicate=0, dp_shard=0). {tie}"
        )
        assert told["tp cut"].startswith(
            f"{kind}'1.weight' of rank 3 (dp=1, tp=1) is not that of rank 1 (dp=0, tp=1). {tie}"
        )
        assert told["tp copied"].startswith(
            f"{kind}'0.weight' of rank 1 (dp=0, tp=1) is not that of rank 0 (dp=0, tp=0). W"
        )
        assert told["tp tied"].startswith(
            f"{kind}'0.weight' of rank 1 (dp=0, tp=1), 3 (dp=1, tp=1) is not that of rank 0 (dp=0, tp=0), "
            f"2 (dp=1, tp=0). {tie}"
        )
        assert told["pp"].startswith(
            f"{kind}'third.bias' of rank 3 (pp=1, dp=1) is not that of rank 2 (pp=1, dp=0). {tie}"
        )
        assert told["pp state"].startswith(
            f"{kind}'optimizer.state.0.exp_avg' of rank 1 (pp=0, dp=1) is not that of rank 0 (pp=0, dp=0). {tie}"
        )
        assert told["ep"].startswith(
            f"{kind}'1.0.weight' of rank 3 (dp=1, ep=1) is not that of rank 1 (dp=0, ep=1). {tie}"
        )
        assert told["ep shared"].startswith(f"{kind}'0.0.weight' of rank 3 (dp=1, ep=1) is not that of rank 0 (")
        assert told["ddp"].startswith(f"{kind}'0.weight' of rank 2 (dp=2) is not that of rank 0 (dp=0). W")
        assert [told["hsdp buffer"], told["pp alone"], told["pp sharded"]] == [""] * 3  # no copies, or not compared


def files(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}


def saved(rank: int, folder: Path, trigger: str) -> tuple[str, dict[str, bytes], dict[str, bytes]]:
    """One iteration that saves; then rank 1 changes a parameter, and something asks for one more save. What that
    raises, and the files before and after it."""
    model = distributed.prepare_model(net(), "fsdp" if trigger == "sharded" else "ddp")
    beside = distributed.prepare_model(net(), "ddp") if trigger == "sharded" else model
    trainer, before = Engine(nothing), {}
    checkpoint = Checkpoint({"model": model}, folder, n_saved=5, asynchronous=trigger == "asynchronous")
    handle = trainer.on(Events.STARTED, ConsistencyCheck(beside, before_saving=trigger != "off"))
    if trigger == "removed":
        handle.remove()
    if trigger in ("end", "signal"):
        trainer.on(Events.ITERATION_COMPLETED(once=1) | Events.COMPLETED, checkpoint)
    else:
        trainer.on(Events.ITERATION_COMPLETED, checkpoint)
    Preemption(checkpoint, [signal.SIGUSR1]).attach(trainer)

    def change(engine: Engine) -> None:
        checkpoint.wait()
        distributed.barrier("written")
        before.update(files(folder))
        distributed.barrier("read")
        if rank == 1:
            diverge(beside, "0.weight")
            if trigger == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)

    trainer.on(Events.ITERATION_COMPLETED(once=2), change, priority=1)
    told = message(lambda: trainer.run(range(100_000 if trigger == "signal" else 2)))
    distributed.barrier("over")
    return told, before, files(folder)


FAILING = ("every", "end", "signal", "asynchronous", "sharded")


def attached_otherwise(rank: int) -> str:
    engine = Engine(nothing)
    engine.on(Events.STARTED, ConsistencyCheck(net(), before_saving=rank == 1))
    return message(lambda: engine.run([1]))


def saves(rank: int, size: int, base: Path) -> dict[str, Any]:
    with distributed.process_group(timeout=300):
        otherwise = {"on one rank": (attached_otherwise(rank), {}, {})}
        return otherwise | {trigger: saved(rank, base / trigger, trigger) for trigger in (*FAILING, "off", "removed")}


def test_a_difference_fails_the_save_on_all_ranks_before_a_byte_is_written(tmp_path: Path) -> None:
    for seen in run_ranks(saves, 2, tmp_path, init=False, deadline_s=120):
        for trigger in FAILING:
            told, before, after = seen[trigger]
            assert told.startswith("ConsistencyError: "), (trigger, told)
            assert "was not saved, and older ones are as they were. The parameters differ between" in told
            assert "'0.weight' of rank 1 is not that of rank 0. There is no majority" in told
            assert len(before) >= 2
            assert after == before, trigger
        assert "ConsistencyCheck at Events.STARTED and before saves, but rank 0 has" in seen["on one rank"][0]
        for trigger in ("off", "removed"):
            told, before, after = seen[trigger]
            assert told == ""
            assert len(after) > len(before)
