"""Find parameters that a checkpoint would lose, as ranks have different ones with the same name and it keeps one.

That happens with stages of a pipeline, or experts, that the user has spread over ranks.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dengine.checkpoint.formats.sharded.boxes import local_box
from dengine.compiled_names import without_compiled
from dengine.control.plane import plane
from dengine.distributed import unwrap_model, world
from dengine.dtensor import is_fsdp1, is_made_of_others, local_part, mesh_of
from dengine.errors import CheckpointError

__all__ = ["Print", "prints_of", "refuse_lost"]


class Print(NamedTuple):
    """The values of a parameter that ranks compare: its shape and type, and a digest of some of its elements."""

    kind: str
    digest: bytes


_NUM_SAMPLES = 16  # elements of a parameter: if two were drawn or trained separately, nearly all of them differ


def prints_of(models: Mapping[str, nn.Module], apart: Collection[tuple[str, ...]] = ()) -> dict[str, dict[str, Print]]:
    """For each of `models`, a print of each parameter of which nothing says that all ranks have the same: by its name
    and, of a part of a tensor, its place.

    None of what DDP or FSDP holds, what is sharded over all ranks, or is `apart` (the paths of what ranks have parts of
    on purpose, all of which are kept). No buffers: those of a batch norm differ between ranks, and rank 0's count.

    No collective. Cost: nothing on a lone rank, for a model in DDP or of FSDP2, and for one that `prepare_model` has
    laid out over the mesh of the run; otherwise a copy of 16 elements of each parameter to the host.
    """
    num_ranks = world().size
    if num_ranks == 1:
        return {}
    prepared = plane().prepared.living_models().values() if world().mesh is not None else ()
    known = {id(model) for model in prepared}  # compared and made equal when they were prepared
    found = {
        name: _prints_of(model, num_ranks, {path[1] for path in apart if path[0] == name})
        for name, model in models.items()
        if id(unwrap_model(model)) not in known and not any(map(is_fsdp1, model.modules()))
    }
    return {name: prints for name, prints in found.items() if prints}


def _prints_of(model: nn.Module, num_ranks: int, apart: Collection[str]) -> dict[str, Print]:
    alike = set(_kept_equal(model, num_ranks))
    samples: dict[str, tuple[str, torch.Tensor]] = {}
    for name, parameter in unwrap_model(model).named_parameters():
        mesh = mesh_of(parameter)
        if id(parameter) in alike or (mesh is not None and mesh.size() == num_ranks) or without_compiled(name) in apart:
            continue
        local = local_part(parameter)
        if local.layout != torch.strided or not local.numel() or is_made_of_others(local):
            continue
        place = f" from {local_box(name, parameter).offsets}" if mesh is not None else ""
        samples[without_compiled(name) + place] = f"{tuple(parameter.shape)} {parameter.dtype}", _sample(local)
    return _printed(samples)


def refuse_lost(everyone: Sequence[dict[str, dict[str, Print]]], *, is_united: bool = False) -> None:
    """Refuse to save a model of which a part would be lost.

    With `is_united`, names that only some ranks have are saved (into a folder).

    Raises:
        CheckpointError: a model has different parameters on two ranks; the message names it, and both ranks.
    """
    for name in sorted({name for prints in everyone for name in prints}):
        of_ranks = [prints.get(name, {}) for prints in everyone]
        for key in dict.fromkeys(key for prints in of_ranks for key in prints):
            if lost := _lost(key, of_ranks, is_united):
                raise CheckpointError(f"Nothing was saved or changed, since {f'{name}/{key}'!r} {lost}: {_WAY_OUT}")


def _lost(key: str, of_ranks: Sequence[dict[str, Print]], is_united: bool) -> str | None:
    """How the parameter `key` differs between ranks, so that a part of it would be lost; None if it does not."""
    holders = [rank for rank, prints in enumerate(of_ranks) if key in prints]
    # A part of a tensor that is sharded over some of the ranks is not on the others.
    if " from (" not in key and not is_united and len(holders) < len(of_ranks):
        lacking = next(rank for rank in range(len(of_ranks)) if rank not in holders)
        return f"is on rank {holders[0]}, but not on rank {lacking}"
    first = of_ranks[holders[0]][key]
    other = next((rank for rank in holders if of_ranks[rank][key] != first), None)
    return None if other is None else f"of rank {other} is not that of rank {holders[0]}"


_WAY_OUT = (
    "a checkpoint keeps one tensor for a name, so the other is lost. If the ranks train one model, have "
    "prepare_model() or DDP keep it the same; if each has a part of its own (stages of a pipeline, experts), say "
    'so by prepare_model(..., parts="pp"), and all parts are kept.'
)


def _kept_equal(model: nn.Module, num_ranks: int) -> Iterator[int]:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.process_group.size() == num_ranks:
            yield from map(id, module.parameters())


def _sample(local: torch.Tensor) -> torch.Tensor:
    """The bytes of some elements. Shapes: result (n,) uint8."""
    flat = local.detach().reshape(-1)
    step = max(1, flat.numel() // _NUM_SAMPLES)
    return flat[::step][:_NUM_SAMPLES].contiguous().view(torch.uint8)


def _printed(samples: dict[str, tuple[str, torch.Tensor]]) -> dict[str, Print]:
    by_device: dict[torch.device, list[str]] = {}
    for name, (_, sample) in samples.items():
        by_device.setdefault(sample.device, []).append(name)
    prints: dict[str, Print] = {}
    for names in by_device.values():
        # One copy for each device: each tensor by itself would wait for it.
        content = torch.cat([samples[name][1] for name in names]).cpu().numpy().tobytes()
        start = 0
        for name in names:
            what, sample = samples[name]
            digest = hashlib.sha256(content[start : start + sample.numel()]).digest()[:8]
            prints[name] = Print(what, digest)
            start += sample.numel()
    return prints
