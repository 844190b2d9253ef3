"""Clip gradients of any mix of layouts by their norm, in which each element counts once."""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dengine.comm.parts import parts_of_parameters
from dengine.dtensor import is_dtensor, local_part, mesh_of, sharding_groups, summed_up
from dengine.launch.world import refuse_on_rank_zero_alone, world
from dengine.parallel.gradients import scale_gradients
from dengine.types import accumulator_dtype

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients of `parameters` in place, so that their norm is at most `max_norm`; gives the norm before.

    As `torch.nn.utils.clip_grad_norm_`, which it is for plain tensors. DTensors are counted as whole tensors, each
    element once, whatever their meshes and placements: FSDP2, HSDP, tensor parallelism, and mixtures of them and plain
    tensors.

    Args:
        norm_type: the order of the norm, above 0; `inf` is the largest absolute value.
        error_if_nonfinite: raise instead of scaling by a norm that is not finite. Waits for the device.
        foreach: False takes the tensors one by one.

    Returns: a plain tensor of one number on the device of the first gradient, the same on all ranks of a mesh.

    Raises:
        ValueError: `norm_type` is not positive. RuntimeError: see `error_if_nonfinite`.
        RankZeroCollectiveError: there are DTensors, and only rank 0 runs here.

    Collective if there are DTensors: call it on all ranks of their meshes, with parameters in the same order. Cost: one
    all-reduce of a few numbers for each group of ranks that shards them, or has other stages of a pipeline or experts
    (`prepare_model(parts=)`); none for plain tensors. A gradient that is a partial sum is summed up first, which
    costs an all-reduce of it.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type!r} must be a positive number, or inf for the largest absolute value.")
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parts = _groups_of_parts()
    # A parameter without a gradient does not count, but may have one on another rank, which then expects the sum.
    spread = [
        each
        for each in listed
        if each.grad is not None or (each.requires_grad and (is_dtensor(each) or id(each) in parts))
    ]
    is_whole = not any(is_dtensor(each) or is_dtensor(each.grad) for each in spread)
    # If all of a stage is frozen, the other stages still expect its part of the norm.
    if is_whole and (listed or not parts) and parts.keys().isdisjoint(map(id, listed)):
        return torch.nn.utils.clip_grad_norm_(listed, max_norm, norm_type, error_if_nonfinite, foreach)
    refuse_on_rank_zero_alone("clip_grad_norm_()")
    total = _total_norm(spread, parts, float(norm_type))
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(
            f"The norm of order {norm_type} of the gradients is {float(total)}, so they cannot be clipped. "
            "error_if_nonfinite=False scales them all the same."
        )
    gradients = [local_part(each.grad) for each in spread if each.grad is not None]
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for some in _of_one_kind(gradients):
        exact = factor.to(torch.promote_types(some[0].dtype.to_real(), torch.float32))
        for part in [some] if foreach is not False else [[each] for each in some]:
            scale_gradients(part, exact)
    return total.float()


def _total_norm(parameters: list[Tensor], along: Mapping[int, tuple[dist.ProcessGroup, ...]], order: float) -> Tensor:
    """The norm of all gradients. Shapes: result (), on the device of the first part."""
    op = dist.ReduceOp.MAX if order == math.inf else dist.ReduceOp.SUM
    parts: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for parameter in parameters:
        groups = sharding_groups(parameter if parameter.grad is None else parameter.grad)
        found = parts.setdefault((*groups, *along.get(id(parameter), ())), [])
        if parameter.grad is not None and (local := local_part(summed_up(parameter.grad))).numel():
            found.append(local)
    if not parameters:  # all of this stage are frozen
        parts[next(iter(along.values()))] = []
    device = local_part(parameters[0]).device if parameters else world().device
    # Shards may have been moved to the host, which the groups of the mesh need not reach.
    meshes = (mesh for each in parameters for mesh in (mesh_of(each), mesh_of(each.grad)) if mesh is not None)
    transport = next((mesh.device_type for mesh in meshes), device)
    sums = torch.stack([_sum_of_powers(locals_, order, device) for locals_ in parts.values()]).to(transport)
    # Groups with different parts of the model come last, so that all ranks go through the groups in one order.
    last = [group for groups in along.values() for group in groups]
    order_of_groups = [*dict.fromkeys([*(each for groups in parts for each in groups if each not in last), *last])]
    for group in order_of_groups:
        indices = [index for index, groups in enumerate(parts) if group in groups]
        of_group = sums[indices]
        if group in last and group is order_of_groups[-1]:  # the other parts may be laid out otherwise: one number each
            of_group = torch.cat([of_group, sums.new_zeros(1)])
            of_group = of_group.amax(0, keepdim=True) if order == math.inf else of_group.sum(0, keepdim=True)
            sums[indices] = 0
            indices = indices[:1]
        dist.all_reduce(of_group, op, group=group)
        sums[indices] = of_group
    total = sums.amax() if order == math.inf else sums.sum().pow(1 / order)
    return total.to(device)


def _groups_of_parts() -> dict[int, tuple[dist.ProcessGroup, ...]]:
    """By the id of a parameter, the groups in which each rank has a different part of its model (stages, experts)."""
    parts = parts_of_parameters()
    if (mesh := world().mesh) is None or not parts:
        return {}
    # The last dimension first: the stages of a pipeline need not all have experts, but all have a norm.
    groups = {names: tuple(mesh.get_group(name) for name in reversed(names)) for names in set(parts.values())}
    return {key: groups[names] for key, names in parts.items()}


def _sum_of_powers(locals_: list[Tensor], order: float, device: torch.device) -> Tensor:
    """The sum of powers of the absolute values, in float64, which cannot overflow; for inf the largest value."""
    total = torch.zeros((), dtype=accumulator_dtype(device), device=device)
    for some in _of_one_kind(locals_):
        wide = torch.promote_types(some[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(some, order, dtype=wide)).to(device, total.dtype)
        total = torch.maximum(total, norms.amax()) if order == math.inf else total + norms.pow(order).sum()
    return total


def _of_one_kind(tensors: list[Tensor]) -> list[list[Tensor]]:
    """`tensors` by device and dtype, for one operation on each list."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for each in tensors:
        kinds.setdefault((each.device, each.dtype), []).append(each)
    return list(kinds.values())
