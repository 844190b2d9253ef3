"""Evaluate a model outside of DDP, on all ranks with the same buffers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dengine.comm.collectives import broadcast_each, broadcast_tensors
from dengine.comm.mesh import sources_of
from dengine.comm.parts import Dimensions, parts_of_names
from dengine.dtensor import has_dimension, is_dtensor, local_part, mesh_of
from dengine.launch.world import World, world
from dengine.parallel.model import unwrap_model

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """A context with the unwrapped module in eval mode and rank 0's buffers, to evaluate over shards of different
    length.

    DDP's own forward broadcasts buffers in every batch, also under `eval()`, and hangs if a rank has fewer batches. And
    batch-norm statistics differ between ranks after a training step, so each rank would evaluate with its own. The
    step of an engine is written before the `with` gives the module: there, `unwrap_model(model)` is the same one. At
    the end, also after an exception, every module is in its former mode, and each rank has its own buffers again.

    Collective: enter it on all ranks, once per evaluation. Cost: one broadcast of the buffers per dtype; their copy.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> with evaluating(net) as bare, torch.no_grad():
        ...     bare(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    bare = unwrap_model(model)
    modes = {module: module.training for module in (model, *model.modules())}
    buffers = [local_part(buffer) for buffer in bare.buffers()]
    own = [buffer.clone() for buffer in buffers] if world().rank != 0 else []
    _broadcast_buffers(bare, world())
    for module in (model, bare):  # the wrapper has its own mode
        module.eval()
    try:
        yield bare
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in zip(buffers, own, strict=False):
            buffer.copy_(value)


def _broadcast_buffers(model: nn.Module, here: World) -> None:
    """Overwrite each buffer (of a DTensor, its local part) with that of the first rank that has the same one."""
    named = dict(model.named_buffers())
    parts = parts_of_names(model, ["", *named])  # "" is the model itself
    plain: dict[Dimensions, list[Tensor]] = {parts.get("", ()): []}
    if has_dimension(here.mesh, "ep"):  # a stage of a pipeline may have no experts, but all stages make the same calls
        plain.setdefault(tuple(name for name in here.coordinates if name in (*parts.get("", ()), "ep")), [])
    for name, buffer in named.items():
        if not is_dtensor(buffer):
            plain.setdefault(parts.get(name, ()), []).append(buffer)
    for own, buffers in plain.items():
        broadcast_tensors(buffers, within=_sources_beside(own, here) if own else None)
    for name, buffer in named.items():
        if (mesh := mesh_of(buffer)) is not None:
            own = (*parts.get(name, ()), *(mesh.mesh_dim_names or ()))
            broadcast_each([local_part(buffer)], within=_sources_beside(own, here))


def _sources_beside(names: Sequence[str], here: World) -> list[tuple[int, Any]]:
    """The sources of tensors that differ only along the dimensions `names` of the mesh."""
    if here.mesh is None:
        return []
    others = [name for name in here.mesh.mesh_dim_names or () if name not in names]
    return [source for name in others for source in sources_of(here.mesh[name])]
