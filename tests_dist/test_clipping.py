"""`clip_grad_norm_` over 4 ranks on meshes of every kind, against torch's own on whole tensors in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tensors import whole_tensor
from torch import nn
from torch.testing import assert_close

from dengine import RankZeroCollectiveError, distributed

ORDERS = [1.0, 2.0, 3.5, float("inf")]
SHAPES = {"plain": (3, 2), "tp": (8, 3), "strided": (12, 5), "uneven": (3, 4), "both": (8, 6), "partial": (2, 5)}


def gradients(scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def laid_out(mesh: Any, scale: float) -> dict[str, nn.Parameter]:
    """Parameters on meshes of their own, with the parts of `gradients()` that belong there."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    whole = gradients(scale)
    layouts: dict[str, Any] = {
        "tp": (mesh["tp"], [Shard(1)]),
        "strided": (mesh, [_StridedShard(0, split_factor=2), Shard(0)]),
        "uneven": (mesh["dp"], [Shard(0)]),
        "both": (mesh, [Replicate(), Shard(0)]),
        "partial": (mesh["tp"], [Replicate()]),
    }
    made = {"plain": nn.Parameter(torch.zeros(SHAPES["plain"]))}
    made["plain"].grad = whole["plain"]
    for name, (on, placements) in layouts.items():
        spread = distribute_tensor(whole[name], on, placements, src_data_rank=None)
        made[name] = nn.Parameter(torch.zeros_like(spread))
        if name == "partial":
            share = (0.25 if on.get_local_rank() == 0 else 0.75) * whole[name]
            spread = DTensor.from_local(share, on, [Partial()])
        made[name].grad = spread
    # No gradient on any rank, and none that counts.
    made["unused"] = nn.Parameter(distribute_tensor(torch.zeros(4), mesh["dp"], [Shard(0)], src_data_rank=None))
    made["frozen"] = nn.Parameter(torch.zeros(2), requires_grad=False)
    return made


def mixed(rank: int, size: int) -> list[tuple[float, float, float, int, dict[str, torch.Tensor]]]:
    from torch.distributed.device_mesh import init_device_mesh

    found = []
    with distributed.process_group():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        own, num_sent = dist.all_reduce, 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_sent
            num_sent += 1
            return own(*args, **kwargs)

        for order in ORDERS:
            for scale, foreach in ((1.0, None), (1e-3, None), (1.0, False)):
                parameters = laid_out(mesh, scale)
                dist.all_reduce, num_sent = counted, 0
                norm = distributed.clip_grad_norm_(parameters.values(), 0.5, order, foreach=foreach)
                dist.all_reduce = own
                after = {name: whole_tensor(each.grad) for name, each in parameters.items() if name in SHAPES}
                found.append((order, scale, float(norm), num_sent, after))
    return found


def test_the_norm_is_that_of_the_whole_tensors_whatever_their_meshes() -> None:
    for of_rank in run_ranks(mixed, 4):
        for order, scale, norm, num_sent, after in of_rank:
            expected = [nn.Parameter(torch.zeros_like(each)) for each in gradients(scale).values()]
            for parameter, gradient in zip(expected, gradients(scale).values(), strict=True):
                parameter.grad = gradient
            wanted = nn.utils.clip_grad_norm_(expected, 0.5, order)
            assert norm == pytest.approx(float(wanted), rel=1e-6)
            assert num_sent == 2, "one sum for each of the groups dp and tp"
            for parameter, name in zip(expected, SHAPES, strict=True):
                assert_close(after[name], parameter.grad, rtol=1e-6, atol=1e-6, msg=name)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))


def samples() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def trained(rank: int, size: int) -> tuple[list[float], list[torch.Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    with distributed.process_group():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = parallelize_module(net(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        norms = []
        for _ in range(3):
            mine = samples().chunk(2)[mesh.get_local_rank("dp")]
            model(mine).square().mean().backward()
            norms.append(float(distributed.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step()
            optimizer.zero_grad()
        return norms, [whole_tensor(each.detach()) for each in model.parameters()]


def test_a_tensor_parallel_model_of_fsdp_trains_as_in_one_process() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norms = []
    for _ in range(3):
        model(samples()).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    for found, parameters in run_ranks(trained, 4):
        assert found == pytest.approx(norms, rel=1e-6)
        for parameter, other in zip(model.parameters(), parameters, strict=True):
            assert_close(other, parameter.detach(), rtol=1e-6, atol=1e-6)


def wrong(rank: int, size: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    seen = []
    with distributed.process_group():
        mesh = init_device_mesh("cpu", (2,))
        parameter = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        bad = torch.tensor([1.0, float("nan"), 1.0, 1.0])
        parameter.grad = distribute_tensor(bad, mesh, [Shard(0)])
        for kind, clip in (
            (RuntimeError, lambda: distributed.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)),
            (RankZeroCollectiveError, distributed.rank_zero_only(lambda: distributed.clip_grad_norm_([parameter], 1))),
        ):
            try:
                clip()
            except kind as error:
                seen.append(type(error).__name__)
        local: Any = parameter.grad
        seen.append(str(local.full_tensor().nan_to_num(7).tolist()))
    return seen


def test_a_norm_that_is_none_is_an_error_on_all_ranks_and_changes_nothing() -> None:
    first, second = run_ranks(wrong, 2)
    assert second == ["RuntimeError", "[1.0, 7.0, 1.0, 1.0]"]
    assert first == ["RuntimeError", "RankZeroCollectiveError", "[1.0, 7.0, 1.0, 1.0]"]


def of_stages(rank: int, size: int) -> list[float]:
    """A stage of which nothing is trained, given with its parameters and without; stages that tp cuts up otherwise."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    found = []
    with distributed.process_group(mesh={"pp": 2, "tp": 2}) as here:
        is_first = here.coordinates["pp"] == 0
        frozen = distributed.prepare_model(nn.Linear(4, 4).requires_grad_(is_first), parts="pp")
        more: dict[str, nn.Module] = {"norm": nn.LayerNorm(4)} if is_first else {}
        cut: nn.Module = nn.ModuleDict({"layer": nn.Linear(4, 4), **more})
        cut = distributed.prepare_model(cut, parts="pp", tensor_parallel={"layer": ColwiseParallel()})
        trained = [parameter for parameter in frozen.parameters() if parameter.requires_grad]
        for order in (2.0, float("inf")):
            for parameters in (list(frozen.parameters()), trained, list(cut.parameters())):
                for parameter in parameters:
                    parameter.grad = torch.full_like(parameter, 2.0) if parameter.requires_grad else None
                found.append(float(distributed.clip_grad_norm_(parameters, 1.0, order)))
    return found


def test_a_stage_without_gradients_and_stages_that_are_cut_up_otherwise_have_one_norm() -> None:
    expected = [2 * 20**0.5, 2 * 20**0.5, 2 * 48**0.5, 2.0, 2.0, 2.0]
    for found in run_ranks(of_stages, 4, deadline_s=60):
        assert found == pytest.approx(expected, rel=1e-6)


def of_bare_stages(rank: int, size: int) -> list[float]:
    """A stage without a parameter, and one of which nothing is trained, beside stages that DDP wraps."""
    found = []
    with distributed.process_group(mesh={"pp": 2, "dp": 2}) as here:
        is_first = here.coordinates["pp"] == 0
        stages: list[nn.Module] = [
            nn.Linear(4, 4) if is_first else nn.Identity(),
            nn.Linear(4, 4).requires_grad_(is_first),
        ]
        for stage in stages:
            prepared = distributed.prepare_model(stage, parts="pp")
            distributed.barrier("prepared")
            for parameter in prepared.parameters():
                parameter.grad = torch.full_like(parameter, 2.0) if parameter.requires_grad else None
            found.append(float(distributed.clip_grad_norm_(prepared.parameters(), 1.0)))
        with pytest.raises(ValueError, match="prepare each module in it"):
            distributed.prepare_model(nn.ModuleList([nn.Linear(2, 2)]), "fsdp", parts="pp")
    return found


def test_a_stage_without_parameters_or_without_trained_ones_takes_part() -> None:
    for found in run_ranks(of_bare_stages, 4, deadline_s=60):
        assert found == pytest.approx([2 * 20**0.5] * 2, rel=1e-6)
