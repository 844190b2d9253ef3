"""Models that the user has sharded over a mesh: which of them are refused, and when to warn about their data.

Ranks of one tensor-parallel group need the same data. Only a model says which ranks those are: by parameters that are
DTensors, or by the mesh that it was prepared with.
"""

import warnings
from math import prod
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from dengine.comm.parts import named_parameters_beside_parts
from dengine.control.plane import plane
from dengine.control.prepared import Prepared
from dengine.dtensor import describe_mesh, has_dimension, is_fsdp, is_mesh, mesh_of
from dengine.launch.world import World, world

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["check_mesh", "note_different_samples", "note_model", "note_part_of_ranks", "refuse_laid_out", "sources_of"]

# Dimensions whose ranks share samples, by the names that torchtitan, accelerate and Megatron give them.
_SHARED = ("tp", "cp", "pp", "sp", "mp", "etp", "tensor", "context", "pipe", "pipeline", "sequence", "model")


def refuse_laid_out(model: nn.Module, strategy: str) -> None:
    """Refuse a model that is sharded already, but for the parts inside it that were prepared before.

    Raises: ValueError: a parameter is a DTensor, which neither DDP nor a broadcast from rank 0 takes.
    """
    for name, parameter in named_parameters_beside_parts(model):
        mesh = mesh_of(parameter)
        if has_dimension(mesh, "ep") and has_dimension(world().mesh, "ep"):
            raise ValueError(
                f"{name!r} is cut up over the dimension ep of the mesh, so that it is of experts: prepare the module "
                'that has them first, prepare_model(experts, parts="ep"), and then the whole model.'
            )
        if mesh is not None:
            raise ValueError(
                f"prepare_model(strategy={strategy!r}) takes a model whose parameters are plain tensors, but {name!r} "
                f"is a DTensor on {describe_mesh(mesh)}: the model is sharded or tensor-parallel already. Over the "
                "other dimension of the mesh use torch's own fully_shard(model, mesh=mesh['dp']), which takes such a "
                "model; prepare_model(model, 'none') then leaves it as it is. Or prepare it before it is laid out."
            )


def check_mesh(mesh: object) -> None:
    """Check the argument `mesh=`.

    Raises: TypeError: it is no DeviceMesh. ValueError: this rank is not in it, or its dimensions lack names.
    """
    if not is_mesh(mesh):
        raise TypeError(f"mesh= takes a torch DeviceMesh, as init_device_mesh() gives it, but got {mesh!r}.")
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh= is {describe_mesh(mesh)}, which rank {world().rank} is no part of: pass it its own mesh."
        )
    if mesh.ndim > 1 and mesh.mesh_dim_names is None:
        raise ValueError(
            f"mesh= is {describe_mesh(mesh)} without names, but fully_shard needs to know which of them replicates: "
            "init_device_mesh(..., mesh_dim_names=('dp_replicate', 'dp_shard'))."
        )


def sources_of(mesh: "DeviceMesh") -> "list[tuple[int, ProcessGroup]]":
    """For each dimension of the mesh, its first rank and its group.

    Broadcasts over them, one after the other, give every rank of the mesh what the first rank has.
    """
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    return [(dist.get_global_rank(group, 0), group) for group in groups]


def note_part_of_ranks(what: str, mesh_size: int, here: World) -> None:
    """Note that a model is spread over `mesh_size` of the ranks; `what` names the option."""
    if mesh_size < here.size:
        _note_sharing(f"{what} spreads a model over {mesh_size} of the {here.size} ranks")


def note_model(model: nn.Module) -> None:
    """Note that `model` is used: the user may have sharded it himself."""
    if (shared := _shared_by(model)) is not None:
        _note_sharing(shared)


def note_different_samples() -> None:
    """Note that each rank gets different samples, unless the mesh says otherwise."""
    if world().data_size < world().size:
        return
    prepared = plane().prepared
    prepared.deals_to_all_ranks = True
    for model in prepared.living_models().values():  # which may have been laid out after it was prepared
        note_model(model)
    _warn_if_both(prepared)


def _note_sharing(why: str) -> None:
    if world().mesh is not None:  # by which the data are dealt out
        return
    prepared = plane().prepared
    prepared.shared_data = prepared.shared_data or why
    _warn_if_both(prepared)


def _warn_if_both(prepared: Prepared) -> None:
    if prepared.shared_data is None or not prepared.deals_to_all_ranks or prepared.has_warned_of_shared_data:
        return
    prepared.has_warned_of_shared_data = True
    warnings.warn(
        f"{prepared.shared_data}, but the data are dealt out to all {world().size} ranks, so that ranks which should "
        "see the same samples see different ones. Pass the mesh to process_group() (mesh={'dp': -1, 'tp': 2}), and "
        "prepare_data_loader() and ElasticSampler() give those ranks the same samples.",
        UserWarning,
        stacklevel=4,
    )


def _shared_by(model: nn.Module) -> str | None:
    """The reason why several ranks need the same data for `model`, if its parameters show one."""
    is_sharded = any(map(is_fsdp, model.modules()))
    for mesh in {id(mesh): mesh for mesh in map(mesh_of, model.parameters()) if mesh is not None}.values():
        names = mesh.mesh_dim_names or ()
        shared = [dim for dim, name in enumerate(names) if name.lower() in _SHARED]
        if not shared and not is_sharded and not any(_is_data(name) for name in names):
            shared = list(range(mesh.ndim))  # DTensors that FSDP has not made: tensor parallelism
        if prod(mesh.size(dim) for dim in shared) > 1:
            return f"A {type(model).__qualname__} is tensor-parallel on {describe_mesh(mesh)}"
    return None


def _is_data(name: str) -> bool:
    return name.lower().startswith(("dp", "data", "fsdp", "hsdp", "replicate", "shard"))
