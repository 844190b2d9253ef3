"""Every question about tensors and modules that are spread over ranks: DTensors, their meshes, and FSDP2.

Importing their classes costs a second, so they are looked up where somebody else has imported them: until then there is
no such object.
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
    """Whether it is a tensor of which this rank has a part, a copy or a summand."""
    if type(value) in PLAIN:
        return False
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(value, known.DTensor)


def any_dtensor(values: Iterable[object]) -> bool:
    """Whether one of `values` is a DTensor. Cost: of plain tensors a comparison of types, and no call."""
    return any(type(value) not in PLAIN and is_dtensor(value) for value in values)


def may_be_dtensors() -> bool:
    """Whether anybody in this process has imported what makes one."""
    return "torch.distributed.tensor" in sys.modules


def is_mesh(value: object) -> "TypeGuard[DeviceMesh]":
    """Whether it is torch's arrangement of ranks in dimensions."""
    known = sys.modules.get("torch.distributed.device_mesh")
    return known is not None and isinstance(value, known.DeviceMesh)


def as_fsdp(module: nn.Module) -> "FSDPModule | None":
    """`module` itself if `fully_shard` has cut up its parameters, else None."""
    known = sys.modules.get("torch.distributed.fsdp")
    return module if known is not None and isinstance(module, known.FSDPModule) else None


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` has cut up its parameters."""
    return as_fsdp(module) is not None


def is_made_of_others(tensor: Tensor) -> bool:
    """Whether it keeps its elements in other tensors, and has no memory of its own: a DTensor, a quantized subclass."""
    return type(tensor) not in PLAIN and hasattr(tensor, "__tensor_flatten__")


def with_memory(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of `tensors` that are dense and keep their elements in memory of their own."""
    return [each for each in tensors if each.layout == strided and (type(each) in PLAIN or not is_made_of_others(each))]


def mesh_of(value: object) -> "DeviceMesh | None":
    """The ranks that a DTensor is spread over; None of anything else."""
    return value.device_mesh if is_dtensor(value) else None


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of `tensor`, in the tensor's own memory, without its gradient's history. No collective."""
    detached = tensor.detach() if tensor.requires_grad else tensor
    return detached.to_local() if is_dtensor(detached) else detached


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, as a plain one. Collective where it is a DTensor: a gather over its mesh."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def piece_of(value: object) -> tuple[int, int]:
    """Which piece of `value` this rank has, and how many pieces there are: ranks with the same one hold the same."""
    piece, num_pieces = 0, 1
    if is_dtensor(value):
        mesh = value.device_mesh
        for dim, placement in enumerate(value.placements):
            if not placement.is_replicate():
                piece = piece * mesh.size(dim) + mesh.get_local_rank(dim)
                num_pieces *= mesh.size(dim)
    return piece, num_pieces


def sharding_groups(value: object) -> "tuple[dist.ProcessGroup, ...]":
    """The groups of this rank in which each rank has elements of its own: a sum over all of them is of the whole."""
    if not is_dtensor(value) or value.device_mesh.get_coordinate() is None:
        return ()
    is_other = [not (each.is_replicate() or each.is_partial()) for each in value.placements]
    return tuple(value.device_mesh.get_group(dim) for dim, is_sharded in enumerate(is_other) if is_sharded)


def summed_up(tensor: Tensor) -> Tensor:
    """`tensor` without partial sums. Collective where it has some: a sum over the ranks that have the summands."""
    if not is_dtensor(tensor) or not any(each.is_partial() for each in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if each.is_partial() else each for each in tensor.placements])


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every rank has whole, laid out as `like`, of the same shape. No collective.

    As it is where `like` is whole, or `tensor` is laid out already.
    """
    if not is_dtensor(like) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def laid_out_like(local: Tensor, like: Tensor) -> Tensor:
    """The DTensor laid out as `like` of which this rank has `local`; `local` itself where `like` is whole."""
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def has_dimension(mesh: "DeviceMesh | None", name: str) -> bool:
    """Whether `mesh` has a dimension of this name, of any size."""
    return mesh is not None and name in (mesh.mesh_dim_names or ())


def describe_mesh(mesh: "DeviceMesh") -> str:
    """As an error names it: "a mesh of dp=2, tp=4"."""
    sizes = tuple(mesh.size(dim) for dim in range(mesh.ndim))
    names = mesh.mesh_dim_names
    text = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True)) if names else str(sizes)
    return f"a mesh of {text}"
