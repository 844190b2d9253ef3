"""A mesh made by hand: no weight is overwritten, what is not supported says so, copies are compared."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader

from dengine import ConsistencyError, Engine, distributed
from dengine.handlers import ConsistencyCheck


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [each.full_tensor().detach() for each in map(as_any, model.parameters())]


def as_any(value: Any) -> Any:
    return value


def same(first: list[torch.Tensor], model: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, model.parameters(), strict=True))


def tensor_parallel(mesh: Any, seed: int = 0) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(net(seed), mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


def prepared(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    seen: dict[str, Any] = {}
    with distributed.process_group():
        mesh: Any = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        for strategy, options in (("auto", {}), ("ddp", {}), ("fsdp", {"mesh": mesh["dp"]}), ("fsdp", {})):
            laid_out = tensor_parallel(mesh["tp"])
            call = lambda laid_out=laid_out, s=strategy, o=options: distributed.prepare_model(laid_out, s, **o)  # noqa: E731
            seen[f"laid out {strategy} {len(options)}"] = message(call)
        seen["mesh of ddp"] = message(lambda: distributed.prepare_model(net(0), "ddp", mesh=mesh["dp"]))
        seen["no mesh"] = message(lambda: distributed.prepare_model(net(0), "fsdp", mesh=2))
        other = DeviceMesh("cpu", [0, 1])
        mine = DeviceMesh("cpu", [2, 3])
        elsewhere = mine if rank < 2 else other
        nameless = init_device_mesh("cpu", (2, 2))
        seen["nameless"] = message(lambda: distributed.prepare_model(net(0), "fsdp", mesh=nameless))
        seen["mesh of others"] = message(lambda: distributed.prepare_model(net(0), "fsdp", mesh=elsewhere))
        # Every rank begins with weights of its own. Ranks 0 and 2 are one group of dp, 1 and 3 the other.
        part = distributed.prepare_model(net(rank), "fsdp", mesh=mesh["dp"])
        seen["part"] = same(whole(part), net(rank % 2))
        both = distributed.prepare_model(net(rank), "fsdp", mesh=mesh)
        seen["replicated and sharded"] = same(whole(both), net(0))
    return seen


def test_a_mesh_of_some_ranks_keeps_the_weights_of_the_others_and_what_is_laid_out_is_refused() -> None:
    for seen in run_ranks(prepared, 4, init=False, deadline_s=120):
        assert seen["part"]
        assert seen["replicated and sharded"]
        for name in ("laid out auto 0", "laid out ddp 0", "laid out fsdp 1", "laid out fsdp 0"):
            assert "ValueError" in seen[name], (name, seen[name])
            assert "'0.weight' is a DTensor on a mesh of tp=2" in seen[name]
        assert "ValueError: mesh= is what strategy='fsdp' shards over" in seen["mesh of ddp"]
        assert "TypeError: mesh= takes a torch DeviceMesh" in seen["no mesh"]
        assert "a mesh of (2, 2) without names" in seen["nameless"]
        assert "is no part of" in seen["mesh of others"]


def compared(rank: int, size: int) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    seen: dict[str, str] = {}
    engine = Engine(lambda engine, batch: None)
    with distributed.process_group():
        mesh: Any = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        hybrid = distributed.prepare_model(net(0), "fsdp", mesh=mesh)
        both = fully_shard(tensor_parallel(mesh["tp"]), mesh=mesh["dp"])
        copies = tensor_parallel(mesh["tp"])
        spread = distributed.prepare_model(net(0), "fsdp")
        models: dict[str, Any] = {"hybrid": hybrid, "tp and fsdp": both, "copies": copies, "spread": spread}
        for name, model in models.items():
            check = ConsistencyCheck(model)
            seen[f"{name}, alike"] = message(lambda check=check: check(engine))
            with torch.no_grad():
                if rank == 3:
                    as_any(list(model.parameters())[-1]).to_local().view(-1)[0] += 1
            seen[name] = message(lambda check=check: check(engine))
    return seen


def test_copies_of_pieces_are_compared() -> None:
    for seen in run_ranks(compared, 4, init=False, deadline_s=120):
        assert [seen[f"{name}, alike"] for name in ("hybrid", "tp and fsdp", "copies", "spread")] == [""] * 4
        # The mesh is ((0, 1), (2, 3)): rank 3 has the piece that rank 1 has.
        kind = f"{ConsistencyError.__name__}: The parameters differ between ranks:"
        assert f"{kind} '1.bias' of rank 3 is not that of rank 1." in seen["hybrid"]
        # A row-wise bias is whole on both ranks of tp, and cut in two over dp: rank 2 and 3 have the second half.
        assert f"{kind} '1.bias' of rank 3 is not that of rank 2." in seen["tp and fsdp"]
        assert f"{kind} '1.bias' of rank 3 is not that of rank 0." in seen["copies"]
        assert seen["spread"] == ""  # each rank has another piece


def warned(rank: int, size: int, order: str) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from dengine.distributed import ElasticSampler

    with distributed.process_group(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mesh: Any = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

        def data() -> None:
            distributed.prepare_data_loader(DataLoader(range(8), batch_size=2))  # type: ignore[arg-type]
            ElasticSampler(range(8))

        def model() -> Any:
            return distributed.prepare_model(as_any(fully_shard(tensor_parallel(mesh["tp"]), mesh=mesh["dp"])), "none")

        if order == "data first":
            data()
            kept = [model(), model()]
        elif order == "model first":
            kept = [model()]
            data()
        elif order == "right data":
            kept = [model()]
            ElasticSampler(range(8), num_replicas=2, rank=mesh["dp"].get_local_rank())
        elif order == "part":
            kept = [distributed.prepare_model(net(0), "fsdp", mesh=mesh["dp"])]
            data()
        else:  # all ranks have data of their own, and are to
            own = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
            kept = [distributed.prepare_model(net(0), "fsdp", mesh=own)]
            kept.append(distributed.prepare_model(net(0)))
            data()
        assert kept
    return [str(each.message) for each in caught if "samples" in str(each.message)]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("data first", "is tensor-parallel on a mesh of"),
        ("model first", "is tensor-parallel on a mesh of"),
        ("part", "mesh= spreads a model over 2 of the 4 ranks"),
        ("right data", None),
        ("neither", None),
    ],
)
def test_other_data_on_ranks_that_need_the_same_are_told_once(order: str, words: str | None) -> None:
    for told in run_ranks(warned, 4, order, init=False, deadline_s=120):
        assert len(told) == (words is not None), told
        assert words is None or words in told[0]
