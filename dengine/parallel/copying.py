"""Copy a model that is spread over ranks. FSDP2's modules cannot be copied directly."""

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dengine import torch_internals
from dengine.dtensor import as_fsdp, is_dtensor, is_fsdp, local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["copy_of", "reshard"]


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same layout over the ranks. No collective, except those in the set-up of FSDP2."""
    # Groups of ranks, which experts keep to exchange tokens by, cannot be copied: the copy has the same ones.
    memo: dict[int, Any] = {id(group): group for group in torch_internals.process_groups()}
    if not any(map(is_fsdp, model.modules())):
        return copy.deepcopy(model, memo)
    return _sharded_copy(model, memo)


def _sharded_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a model that `fully_shard` has sharded, sharded in the same way.

    A plain copy without storage is sharded again, and then filled with the shards.
    """
    from torch.distributed.fsdp import fully_shard

    # Children first, so that a module's copy finds their copies in the memo.
    sharded = [module for module in reversed(list(model.modules())) if is_fsdp(module)]
    meshes = [torch_internals.mesh_of_fsdp(module) for module in sharded]
    managed = {
        id(each): nn.Parameter(_before_fsdp(each, mesh.mesh_dim_names or ()), requires_grad=each.requires_grad)
        for module, mesh in zip(sharded, meshes, strict=True)
        for each in torch_internals.parameters_of_fsdp(module)
        if is_dtensor(each)
    }
    memo |= managed
    for module in sharded:
        memo[id(module)] = _bare_copy(module, memo)
    copied: nn.Module = copy.deepcopy(model, memo)
    for module in copied.modules():
        torch_internals.clear_load_hooks(module)
    # Parameters that FSDP2 ignores: experts without copies on other ranks.
    ignored = {memo[id(each)] for each in model.parameters() if id(each) not in managed}
    for module, mesh in zip(sharded, meshes, strict=True):
        if torch_internals.is_replicated(module):
            torch_internals.replicate(memo[id(module)], mesh, ignored)
        else:
            fully_shard(memo[id(module)], mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    own = _shards(model)
    device = next(iter(own.values())).device
    cast("Any", copied)._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value)
    with torch.no_grad():
        for name, shard in _shards(copied).items():
            if shard.placements != own[name].placements:
                raise ValueError(f"{name!r} cannot be copied, as it is sharded in a way of its own: {own[name]!r}.")
            local_part(shard).copy_(local_part(own[name]))
    return copied


def _before_fsdp(parameter: "DTensor", names: Collection[str]) -> Tensor:
    """An empty tensor like `parameter` before FSDP2, which is over the dimensions `names`: whole, or spread over
    `tp`.
    """
    from torch.distributed.tensor import distribute_tensor

    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    mesh = parameter.device_mesh
    others = {
        name: placement
        for name, placement in zip(mesh.mesh_dim_names or (), parameter.placements, strict=False)
        if name not in names
    }
    if not others:
        return empty
    return distribute_tensor(empty, mesh[tuple(others)], list(others.values()), src_data_rank=None)


def _bare_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of the module with the class that it had before `fully_shard`, and without the hooks that this added."""
    kind: Any = torch_internals.class_before_fsdp(module)
    bare: nn.Module = kind.__new__(kind)
    own = {name: value for name, value in vars(module).items() if not name.startswith(torch_internals.FSDP_ATTRIBUTES)}
    hooks = {name: type(value)() for name, value in own.items() if "_hooks" in name}
    kept = {name: value for name, value in own.items() if name not in hooks}
    bare.__dict__.update(copy.deepcopy(kept, memo), **{**hooks, **torch_internals.hooks_of_others(module)})
    return bare


def reshard(model: nn.Module) -> None:
    """Replace the whole parameters, which FSDP2 uses in forward and backward, by the shards again."""
    for module in model.modules():
        if (sharded := as_fsdp(module)) is not None:
            sharded.reshard()


def _shards(model: nn.Module) -> "dict[str, DTensor]":
    return {name: value for name, value in model.named_parameters() if is_dtensor(value)}
