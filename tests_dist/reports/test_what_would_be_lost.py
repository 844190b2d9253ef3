"""Parameters that differ between ranks under one name are told at a save; what DDP or FSDP2 holds is not taken so."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dengine import distributed
from dengine.checkpoint import load, save
from dengine.errors import CheckpointError
from dengine.handlers import EMA


def block(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def subgroup(rank: int) -> Any:
    """Ranks (0, 1) and (2, 3): two stages of a pipeline, each on two ranks."""
    return [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]


def ddp_over_all(rank: int) -> nn.Module:
    model = DistributedDataParallel(block(1.0))
    model.module[1].running_mean.fill_(float(rank))
    return model


def compiled_in_ddp(rank: int) -> nn.Module:
    model = block(1.0)
    model[0] = torch.compile(model[0], backend="eager")
    return DistributedDataParallel(model)


def alike_by_hand(rank: int) -> nn.Module:
    model = block(1.0)
    model[1].running_mean.fill_(float(rank))
    return model


def replicas_on_parts(rank: int) -> nn.Module:
    """DDP over a part of the ranks each, of one and the same model."""
    return DistributedDataParallel(block(1.0), process_group=subgroup(rank))


def sharded_over_all(rank: int) -> nn.Module:
    return distributed.prepare_model(block(1.0), "fsdp")


def unprepared(rank: int) -> nn.Module:
    return block(1.0 + rank)


def other_names(rank: int) -> nn.Module:
    return nn.ModuleDict({f"stage{rank // 2}": block(1.0)})


def other_shapes(rank: int) -> nn.Module:
    return nn.Linear(2 + rank, 2)


def stages_in_ddp(rank: int) -> nn.Module:
    return DistributedDataParallel(block(1.0 + rank // 2), process_group=subgroup(rank))


def stages_sharded(rank: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    model = block(1.0 + rank // 2)
    fully_shard(model, mesh=mesh["dp"])
    return model


def expert_beside_shards(rank: int) -> nn.Module:
    """Tensor parallelism by hand over pairs, and a plain expert of each rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    model = nn.ModuleDict({"shared": nn.Linear(4, 4, bias=False), "expert": block(1.0 + rank)})
    weight = distribute_tensor(torch.ones(4, 4), mesh["tp"], [Shard(0)])
    model["shared"].weight = nn.Parameter(weight)
    return model


def flat_shards(rank: int) -> nn.Module:
    """As FSDP1 has them, which needs a GPU: each rank has other parameters, and the state has whole tensors."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Flat(FullyShardedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self._fsdp_wrapped_module = nn.Identity()
            self.weight = nn.Parameter(torch.full((4,), float(rank)))

        modules, named_parameters = nn.Module.modules, nn.Module.named_parameters
        state_dict = lambda self: {"weight": torch.arange(8.0)}  # noqa: E731

    return Flat()


FINE: list[Callable[[int], nn.Module]] = [
    ddp_over_all,
    compiled_in_ddp,
    alike_by_hand,
    replicas_on_parts,
    sharded_over_all,
    flat_shards,
]
LOST: list[Callable[[int], nn.Module]] = [
    other_names,
    other_shapes,
    stages_in_ddp,
    stages_sharded,
    expert_beside_shards,
    unprepared,
]


def saves(rank: int, size: int, folder: str) -> dict[str, tuple[str, str]]:
    """What a save of each says, raised and warned."""
    torch.set_num_threads(1)
    said = {}
    for make in (*FINE, *LOST):
        model = make(rank)
        warned, raised = "", ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                save(Path(folder) / f"{make.__name__}_1{'' if make is sharded_over_all else '.pt'}", {"model": model})
            except CheckpointError as error:
                raised = str(error)
        warned = " ".join(str(each.message) for each in caught if "rank" in str(each.message))
        said[make.__name__] = warned, raised
    average = EMA(compiled := compiled_in_ddp(rank))
    save(Path(folder) / "both_1.pt", {"model": compiled, "ema": average})
    load(Path(folder) / "both_1.pt", {"model": DistributedDataParallel(block(2.0)), "ema": EMA(block(3.0))})
    return said


def test_what_would_be_lost_is_refused_and_replicas_are_not(tmp_path: Path) -> None:
    of_ranks = run_ranks(saves, 4, str(tmp_path), deadline_s=90)
    for make in FINE:
        assert [said[make.__name__] for said in of_ranks] == [("", "")] * 4, make.__name__
    for make in LOST:
        raised = {said[make.__name__][1] for said in of_ranks}
        assert len(raised) == 1
        assert "Nothing was saved or changed, since 'model/" in raised.pop(), make.__name__
        assert not list(tmp_path.glob(f"{make.__name__}*"))
    assert "not on rank 2" in of_ranks[0]["other_names"][1]
    assert "of rank 2 is not that of rank 0" in of_ranks[0]["stages_in_ddp"][1]
    assert "'model/expert.0.weight' of rank 1 is not that of rank 0" in of_ranks[0]["expert_beside_shards"][1]
    assert "'model/0.weight' of rank 1 is not that of rank 0" in of_ranks[0]["unprepared"][1]
    assert "prepare_model" in of_ranks[0]["unprepared"][1]
    names = [name for state in torch.load(tmp_path / "both_1.pt", weights_only=True).values() for name in state]
    assert not [name for name in names if "_orig_mod" in name]


def sharded_compiled(rank: int, size: int, folder: str) -> list[bool]:
    """A compiled block inside what FSDP2 has sharded: saved, and loaded into one that is not compiled, and back."""
    torch.set_num_threads(1)
    path = Path(folder) / "c_1"
    results = []
    for is_compiled in (True, False):
        model = block(1.0 + is_compiled)
        if is_compiled:
            model[0] = torch.compile(model[0], backend="eager")
        model = distributed.prepare_model(model, "fsdp")
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        objects = {"model": model, "optimizer": optimizer}
        save(path, objects)
        kept = [value.full_tensor().clone() for value in model.parameters()]  # type: ignore[attr-defined]
        other = block(7.0)
        if not is_compiled:
            other[0] = torch.compile(other[0], backend="eager")
        other = distributed.prepare_model(other, "fsdp")
        load(path, {"model": other, "optimizer": torch.optim.Adam(other.parameters())})
        found = [value.full_tensor() for value in other.parameters()]  # type: ignore[attr-defined]
        results.append(all(torch.equal(a, b) for a, b in zip(kept, found, strict=True)))
        results.append("_orig_mod" not in (path / "metadata.json").read_text())
    return results


def test_a_compiled_block_in_a_sharded_model_leaves_no_trace(tmp_path: Path) -> None:
    assert run_ranks(sharded_compiled, 2, str(tmp_path), deadline_s=90) == [[True] * 4] * 2


def one_rank_cannot_read(rank: int, size: int, folder: str) -> tuple[str, float, str]:
    import os

    real = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if rank == 1 and "c_2" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    for step in (1, 2):
        save(Path(folder) / f"c_{step}.pt", {"model": block(step)})
    os.open = refusing
    model = block(0)
    from dengine.handlers import Checkpoint

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Checkpoint.resume(folder, {"model": model}, "c")
    os.open = real
    assert path is not None
    return path.name, float(next(model.parameters())[0, 0]), " ".join(str(each.message) for each in caught)


@pytest.mark.parametrize("size", [2])
def test_a_file_that_one_rank_may_not_read_is_passed_over_by_all(tmp_path: Path, size: int) -> None:
    of_ranks = run_ranks(one_rank_cannot_read, size, str(tmp_path), deadline_s=60)
    assert [each[:2] for each in of_ranks] == [("c_1.pt", 1.0)] * size
    assert "c_2.pt cannot be read" in of_ranks[0][2]
