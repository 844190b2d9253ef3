"""Decide over which ranks a model is replicated, sharded and tensor-parallel, by the mesh of `process_group()`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

import torch.distributed as dist
from torch import nn

from dengine.comm.mesh import check_mesh, note_part_of_ranks, refuse_laid_out, sources_of
from dengine.comm.parts import named_modules_beside_parts, named_parameters_beside_parts, parts_inside
from dengine.dtensor import describe_mesh, has_dimension, is_fsdp, mesh_of
from dengine.launch.mesh import DATA_NAMES, MODEL_NAMES, SEQUENCE_NAMES
from dengine.launch.world import World
from dengine.torch_internals import flat_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["Layout", "Parts", "TensorParallel", "apply_plan", "check_plan", "layout_of"]

Parts: TypeAlias = Literal["pp", "ep"]
# Not in quotes as a whole: others write `TensorParallel | None`.
TensorParallel: TypeAlias = Union["ParallelStyle", Mapping[str, "ParallelStyle"]]

_FOLDED = ("cp", "ep")  # ranks along these need not have whole weights either, if there is a dimension to shard over
_AVERAGED = (*DATA_NAMES, *SEQUENCE_NAMES)


@dataclass(frozen=True)
class Layout:
    """The layout of a model over the ranks of a mesh.

    Attributes:
        strategy: what is done over the dimensions of data: "ddp", "fsdp", "replicate", which is DDP by FSDP2's ways
            (for DTensors and experts), or, if there is none, "none".
        data: these dimensions: one that replicates or shards, or a replicating and a sharding one.
        tp: the dimension of tensor parallelism.
        within: the sources of a rank's weights, as for `broadcast_tensors`; None is rank 0 of all.
        within_tp: the same, for weights that are cut up over `tp` already.
        beside_ddp: the same, for a model that is not cut up, along the dimensions in which DDP sends nothing.
        place: the number of this rank's part of the model; ranks with the same number have the same part.
        num_averaged: the number of ranks with their own tokens: gradients are means over them.
        is_of_experts: whether ranks along `ep` have other parts, whose gradients are averaged: that of an expert has
            the tokens of all of them in it already, and is summed up over the ranks that have the same expert.
        joined: the names of the dimensions in `data`, those that replicate and those that shard: several act as one.
    """

    strategy: Literal["ddp", "fsdp", "replicate", "none"]
    data: "DeviceMesh | None" = None
    tp: "DeviceMesh | None" = None
    within: Sequence[tuple[int, Any]] | None = None
    within_tp: Sequence[tuple[int, Any]] = ()
    beside_ddp: Sequence[tuple[int, Any]] = ()
    place: tuple[int, ...] = ()
    num_averaged: int = 1
    is_of_experts: bool = False
    joined: Sequence[Sequence[str]] = ()

    def with_groups(self, here: World) -> "Layout":
        """The same, with `data`. Collective: a group for dimensions that act as one, the first time."""
        if not self.joined or here.mesh is None:
            return self
        names = [flat_mesh(here.mesh, list(each)) for each in self.joined]
        return replace(self, data=here.mesh[tuple(names) if len(names) > 1 else names[0]])

    def refuse_options_of_ddp(self, compression: str | None, kwargs: Mapping[str, object]) -> None:
        """Refuse options of DDP for a model that DDP does not take: one with DTensors or experts. Raises:
        ValueError.
        """
        given = [*kwargs, *(["gradient_compression"] if compression is not None else [])]
        if self.strategy != "fsdp" and given:
            raise ValueError(
                f"{', '.join(given)} of DistributedDataParallel cannot be had for a tensor-parallel model or one with "
                "experts, whose gradients are averaged by FSDP2's ways, since DDP takes no DTensors: leave it out."
            )


def layout_of(
    model: nn.Module, strategy: str, parts: Parts | None, kwargs: Mapping[str, Any], here: World, *, is_planned: bool
) -> Layout:
    """The layout that `prepare_model` gives `model`, by the mesh in `kwargs`, or else that of `process_group()`.

    Raises: ValueError, TypeError: the model is laid out already, the mesh does not fit it, or there is no mesh.
    """
    if here.size == 1:
        return Layout("none")
    if here.mesh is None or not kwargs.keys().isdisjoint(("mesh", "device_mesh", "process_group")):
        for name, is_given in (("tensor_parallel=", is_planned), ("parts=", parts is not None)):
            if is_given:
                raise ValueError(
                    f"{name} is about a dimension of the mesh of the run, so it needs process_group(mesh={{...}}), and "
                    "no mesh=, device_mesh= or process_group= here."
                )
        return _layout_of_arguments(model, strategy, kwargs, here)
    _refuse_shared_statistics(model, here.mesh)
    layout = _layout_on(here.mesh, strategy, parts, here)
    if is_planned and not has_dimension(here.mesh, "tp"):
        raise ValueError(
            f"tensor_parallel= needs a dimension 'tp', but {describe_mesh(here.mesh)} has none: "
            'process_group(mesh={..., "tp": 2}), or 1, which only checks the plan.'
        )
    is_planned &= layout.tp is not None  # over a single rank it is only checked
    is_laid_out = _is_laid_out(model, [layout.tp, *_meshes_of_experts(here.mesh, parts)])
    if is_laid_out and is_planned:
        raise ValueError("tensor_parallel= is for a model that is not laid out yet, but this one has DTensors already.")
    if strategy != "none" and not is_laid_out:
        refuse_laid_out(model, strategy)
    if layout.strategy == "ddp" and (is_planned or is_laid_out or parts == "ep" or parts_inside(model)):
        return replace(layout, strategy="replicate")
    return layout


def _refuse_shared_statistics(model: nn.Module, mesh: "DeviceMesh") -> None:
    """Raises: ValueError: a SyncBatchNorm would count a sample for each rank of `tp`, or wait for another stage."""
    sizes = zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)
    if not any(size > 1 and name in MODEL_NAMES for name, size in sizes):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.process_group in (None, dist.group.WORLD):
            raise ValueError(
                f"{name!r} is a SyncBatchNorm over all ranks, but on {describe_mesh(mesh)} not all have other samples "
                "for it: convert_sync_batchnorm(model, process_group=world.mesh['dp'].get_group()) with the dimension "
                "of the data has it ask those that do."
            )


def _layout_of_arguments(model: nn.Module, strategy: str, kwargs: Mapping[str, Any], here: World) -> Layout:
    if strategy == "none":
        return Layout("none")
    if strategy != "fsdp" and "mesh" in kwargs:
        raise ValueError(
            f"mesh= is what strategy='fsdp' shards over; strategy={strategy!r} takes device_mesh= of one dimension."
        )
    if strategy == "fsdp" or any(parameter.requires_grad for parameter in model.parameters()):
        refuse_laid_out(model, strategy)
    if (mesh := kwargs.get("mesh", kwargs.get("device_mesh"))) is not None:
        check_mesh(mesh)
        note_part_of_ranks("mesh=" if "mesh" in kwargs else "device_mesh=", mesh.size(), here)
    elif (group := kwargs.get("process_group")) is not None:
        note_part_of_ranks("process_group=", group.size(), here)
    if strategy != "fsdp":
        return Layout("ddp")
    # Ranks outside the mesh, if it has only some of the ranks, have their own models.
    return Layout("fsdp", data=mesh, within=None if mesh is None or mesh.size() == here.size else sources_of(mesh))


def _layout_on(mesh: "DeviceMesh", strategy: str, parts: Parts | None, here: World) -> Layout:
    """The layout of `strategy` on `mesh`, the mesh of the world `here`.

    Raises: ValueError: the strategy and the dimensions of the mesh do not fit.
    """
    sizes = {name: size for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True) if size > 1}
    if parts is not None and not has_dimension(mesh, parts):
        raise ValueError(f"parts={parts!r} is a dimension of the mesh, but there is none of that name in {sizes}.")
    if strategy == "ddp" and "dp_shard" in sizes:
        raise ValueError(
            f"strategy='ddp' keeps a whole model on each rank, but {describe_mesh(mesh)} has the dimension dp_shard, "
            "over which it is cut up: 'auto' or 'fsdp' does that; for DDP call the dimension dp or dp_replicate."
        )
    is_sharded = strategy == "fsdp" or (strategy == "auto" and "dp_shard" in sizes)
    own = {name: size for name, size in sizes.items() if name != parts}
    cut = _sharding(own) if is_sharded else []
    replicas = [name for name in own if name in _AVERAGED and name not in cut]
    if is_sharded and not cut and parts != "ep":
        raise ValueError(f"strategy='fsdp' has nothing to shard over in {describe_mesh(mesh)}: add a dp_shard to it.")
    if cut and replicas and list(sizes).index(cut[0]) < list(sizes).index(replicas[-1]):
        raise ValueError(f"{replicas[-1]!r} replicates what {cut[0]!r} shards, so it must come before it in mesh=.")
    joined = [] if strategy == "none" else [each for each in (replicas, cut) if each]
    # Experts belong to a layer, which is on one stage of a pipeline.
    apart = [name for name in sizes if name == parts or (name == "pp" and parts == "ep")]
    sources = {name: sources_of(mesh[name])[0] for name in sizes if name not in apart}
    return Layout(
        "none" if not joined else "fsdp" if cut else "ddp",
        joined=joined,
        tp=mesh["tp"] if "tp" in sizes else None,
        within=None if parts is None else list(sources.values()),
        within_tp=[source for name, source in sources.items() if name != "tp"],
        beside_ddp=[source for name, source in sources.items() if strategy != "none" and name not in (*replicas, *cut)],
        place=tuple(here.coordinates[name] for name in apart),
        num_averaged=prod(size for name, size in sizes.items() if name in _AVERAGED),
        is_of_experts=parts == "ep" and strategy != "none",
    )


def _sharding(sizes: Mapping[str, int]) -> list[str]:
    """The dimensions over which FSDP shards."""
    first = next((name for name in ("dp_shard", "dp", "dp_replicate") if name in sizes), None)
    return [name for name in sizes if name == first or name in _FOLDED]


def _meshes_of_experts(mesh: "DeviceMesh", parts: Parts | None) -> "list[DeviceMesh]":
    """The parts of `mesh` over which the user may have cut up experts already."""
    if parts != "ep":
        return []
    both = tuple(name for name in mesh.mesh_dim_names or () if name in ("ep", "tp"))
    return [mesh["ep"], mesh[both]]


def _is_laid_out(model: nn.Module, over: "Sequence[DeviceMesh | None]") -> bool:
    """Whether `model`, without the parts inside it, is laid out already, over the meshes `over` only."""
    meshes = [mesh for _, each in named_parameters_beside_parts(model) if (mesh := mesh_of(each)) is not None]
    is_sharded = any(is_fsdp(module) for _, module in named_modules_beside_parts(model))
    return bool(meshes) and not is_sharded and all(mesh in over for mesh in meshes)


# -- the plan of tensor parallelism ------------------------------------------------------------------------------


def check_plan(plan: TensorParallel, model: nn.Module, size: int) -> list[str]:
    """The entries of `plan` as lines of text, checked against `model` before anything is changed.

    Raises:
        TypeError: it is no plan. ValueError: it names a module that does not exist, or a layer that cannot be cut up or
            does not divide by `size`.
    """
    from torch.distributed.tensor.parallel.style import ParallelStyle

    if not isinstance(plan, ParallelStyle | Mapping):
        raise TypeError(
            "tensor_parallel= takes a plan as torch's parallelize_module does, {'layers.*.wq': ColwiseParallel()}, but "
            f"got {plan!r}."
        )
    lines = []
    for path, style in ({"": plan} if isinstance(plan, ParallelStyle) else plan).items():
        if not isinstance(style, ParallelStyle):
            raise TypeError(f"tensor_parallel[{path!r}] must be a style such as ColwiseParallel(), but is {style!r}.")
        for name, module in _matching(model, path):
            _check_divides(name, module, style, size)
        lines.append(f"tensor_parallel[{path!r}] = {type(style).__name__}")
    return lines


def apply_plan(plan: TensorParallel, model: nn.Module, tp: "DeviceMesh") -> None:
    """Cut up the parameters of `model` as the checked `plan` says. No collective for those on the meta device."""
    from torch.distributed.tensor.parallel import parallelize_module

    requires = {name: each.requires_grad for name, each in model.named_parameters(remove_duplicate=False)}
    parallelize_module(model, tp, dict(plan) if isinstance(plan, Mapping) else plan, src_data_rank=None)
    for name, each in model.named_parameters(remove_duplicate=False):
        each.requires_grad_(requires[name])  # torch makes new parameters, which all require gradients


def _matching(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules that `path` means, as torch reads it: a pattern for each name between dots."""
    found = [("", model)]
    for token in path.split(".") if path else []:
        found = [
            (f"{start}.{name}".lstrip("."), child)
            for start, module in found
            for name, child in module.named_children()
            if fnmatch(name, token)
        ]
    if not found:
        names = [name for name, _ in model.named_modules() if name]
        close = get_close_matches(path, names, 1) or names[:3]
        raise ValueError(
            f"tensor_parallel= names {path!r}, but there is no such module in this {type(model).__qualname__}"
            + (f": there is {', '.join(map(repr, close))}." if close else ", which has none inside.")
        )
    return found


def _check_divides(name: str, module: nn.Module, style: "ParallelStyle", size: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if not isinstance(style, ColwiseParallel | RowwiseParallel):
        return
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise ValueError(
            f"tensor_parallel= has {type(style).__name__} for {name!r}, which is a {type(module).__qualname__}: it "
            "cuts up nn.Linear and nn.Embedding."
        )
    is_by_rows = isinstance(style, ColwiseParallel) == isinstance(module, nn.Linear)
    length = module.weight.shape[0 if is_by_rows else 1]
    if length % size:
        raise ValueError(
            f"tensor_parallel= cuts dimension {0 if is_by_rows else 1} of {name + '.weight'!r} over the {size} ranks "
            f"of tp, but its length of {length} does not divide by {size}."
        )
