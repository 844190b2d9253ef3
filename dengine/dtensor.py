"""Every question about tensors and modules that are spread over ranks: DTensors, their meshes, and FSDP2.

To import their classes costs a second, so they are only looked up once other code has imported them: before that, no
such object can exist.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn, strided

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = [
    "PLAIN",
    "any_dtensor",
    "as_fsdp",
    "cut_like",
    "describe_mesh",
    "has_dimension",
    "is_dtensor",
    "is_fsdp",
    "is_fsdp1",
    "is_made_of_others",
    "is_mesh",
    "laid_out_like",
    "local_part",
    "may_be_dtensors",
    "mesh_of",
    "piece_of",
    "sharding_groups",
    "summed_up",
    "whole",
    "with_memory",
]

PLAIN = (Tensor, nn.Parameter)  # the types of nearly all tensors: a loop asks for them before it calls anything here


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor: a tensor of which this rank has a part, a copy or a summand."""
    if type(value) in PLAIN:
        return False
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(value, known.DTensor)


def any_dtensor(values: Iterable[object]) -> bool:
    """Whether one of `values` is a DTensor. Cost: for plain tensors one comparison of types each."""
    return any(type(value) not in PLAIN and is_dtensor(value) for value in values)


def may_be_dtensors() -> bool:
    """Whether DTensors can exist: something in this process has imported their module."""
    return "torch.distributed.tensor" in sys.modules


def is_mesh(value: object) -> "TypeGuard[DeviceMesh]":
    """Whether it is a `DeviceMesh`: torch's grid of ranks."""
    known = sys.modules.get("torch.distributed.device_mesh")
    return known is not None and isinstance(value, known.DeviceMesh)


def is_fsdp1(module: nn.Module) -> bool:
    """Whether `module` is in torch's older `FullyShardedDataParallel`, whose state has whole tensors."""
    known = sys.modules.get("torch.distributed.fsdp")
    return known is not None and isinstance(module, known.FullyShardedDataParallel)


def as_fsdp(module: nn.Module) -> "FSDPModule | None":
    """`module` itself if `fully_shard` has cut up its parameters, else None."""
    known = sys.modules.get("torch.distributed.fsdp")
    return module if known is not None and isinstance(module, known.FSDPModule) else None


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` has cut up its parameters."""
    return as_fsdp(module) is not None


def is_made_of_others(tensor: Tensor) -> bool:
    """Whether its elements are in other tensors, not in memory of its own: a DTensor, a quantized subclass."""
    return type(tensor) not in PLAIN and hasattr(tensor, "__tensor_flatten__")


def with_memory(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors among `tensors` that are dense and have memory of their own."""
    return [each for each in tensors if each.layout == strided and (type(each) in PLAIN or not is_made_of_others(each))]


def mesh_of(value: object) -> "DeviceMesh | None":
    """The mesh of ranks that a DTensor is spread over; None for anything else."""
    return value.device_mesh if is_dtensor(value) else None


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, in the same memory, detached from the graph. No collective."""
    detached = tensor.detach() if tensor.requires_grad else tensor
    return detached.to_local() if is_dtensor(detached) else detached


def whole(tensor: Tensor) -> Tensor:
    """The whole of `tensor`, as a plain tensor. Collective if it is a DTensor: a gather over its mesh."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def piece_of(value: object) -> tuple[int, int]:
    """The index of this rank's piece of `value`, and the number of pieces. Ranks with one index have the same piece."""
    piece, num_pieces = 0, 1
    if is_dtensor(value):
        mesh = value.device_mesh
        for dim, placement in enumerate(value.placements):
            if not placement.is_replicate():
                piece = piece * mesh.size(dim) + mesh.get_local_rank(dim)
                num_pieces *= mesh.size(dim)
    return piece, num_pieces


def sharding_groups(value: object) -> "tuple[dist.ProcessGroup, ...]":
    """The groups whose ranks have different elements of `value`: a sum over all of them covers the whole."""
    if not is_dtensor(value) or value.device_mesh.get_coordinate() is None:
        return ()
    is_other = [not (each.is_replicate() or each.is_partial()) for each in value.placements]
    return tuple(value.device_mesh.get_group(dim) for dim, is_sharded in enumerate(is_other) if is_sharded)


def summed_up(tensor: Tensor) -> Tensor:
    """`tensor` without partial sums. Collective if it has some: a sum over the ranks that have the summands."""
    if not is_dtensor(tensor) or not any(each.is_partial() for each in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if each.is_partial() else each for each in tensor.placements])


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `tensor` as a DTensor with the layout of `like`. Every rank has all of `tensor`. No
    collective.

    `tensor` itself if `like` is a plain tensor, or if `tensor` is a DTensor already.
    """
    if not is_dtensor(like) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def laid_out_like(local: Tensor, like: Tensor) -> Tensor:
    """The DTensor with the layout of `like`, of which `local` is this rank's part; `local` itself if `like` is
    plain.
    """
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def has_dimension(mesh: "DeviceMesh | None", name: str) -> bool:
    """Whether `mesh` has a dimension of this name, of any size."""
    return mesh is not None and name in (mesh.mesh_dim_names or ())


def describe_mesh(mesh: "DeviceMesh") -> str:
    """The mesh as an error message names it: "a mesh of dp=2, tp=4"."""
    sizes = tuple(mesh.size(dim) for dim in range(mesh.ndim))
    names = mesh.mesh_dim_names
    text = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True)) if names else str(sizes)
    return f"a mesh of {text}"
