"""Find tensors that a checkpoint would lose, as ranks have different ones with the same name and it keeps one.

That happens with stages of a pipeline, or experts, that the user has spread over ranks, and with what each rank gathers
for itself: a replay buffer.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dengine.checkpoint.formats.sharded.boxes import local_box
from dengine.checkpoint.formats.sharded.tree import all_tensors, path_text, tensors_in
from dengine.checkpoint.states.per_rank import PerRank
from dengine.compiled_names import without_compiled
from dengine.control.plane import plane
from dengine.distributed import unwrap_model, world
from dengine.dtensor import is_fsdp1, is_made_of_others, local_part, mesh_of
from dengine.errors import CheckpointError
from dengine.types import with_per_rank_state

__all__ = ["Print", "prints_of", "prints_of_others", "refuse_lost"]


class Print(NamedTuple):
    """The values of a tensor that ranks compare: its shape and type, and a digest of some of its elements."""

    kind: str
    digest: bytes


_NUM_SAMPLES = 16  # elements of a parameter: if two were drawn or trained separately, nearly all of them differ
_NUM_SAMPLES_OF_OTHERS = 4096  # elements of a tensor in another object, which may differ in few


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
    named = (
        (without_compiled(name), parameter)
        for name, parameter in unwrap_model(model).named_parameters()
        if id(parameter) not in alike
    )
    return _prints(((name, each) for name, each in named if name not in apart), num_ranks, _NUM_SAMPLES)


def prints_of_others(
    objects: Mapping[str, object], states: Mapping[str, Any], apart: Collection[tuple[str, ...]] = ()
) -> dict[str, dict[str, Print]]:
    """The same for each tensor in the `states` of those of `objects` that are of a class of the user's.

    None of models and optimizers, of averages of a model, of engines, and of what is declared (`PerRank`); no buffers
    of a model that an object has.

    No collective. Cost: nothing on a lone rank, or without such an object; otherwise a copy of at most 4096 elements of
    each of their tensors to the host.
    """
    num_ranks = world().size
    engines = with_per_rank_state(objects)
    found = {}
    for name, value in objects.items() if num_ranks > 1 else ():
        if isinstance(value, nn.Module | torch.optim.Optimizer | PerRank) or name in engines:
            continue
        if all_tensors(state := states[name]):
            beside = {path_text(path[1:]) for path in apart if path[0] == name}
            tensors = ((key, each) for key, each in _tensors_of(value, state) if key not in beside)
            found[name] = _prints(tensors, num_ranks, _NUM_SAMPLES_OF_OTHERS)
    return {name: prints for name, prints in found.items() if prints}


def _tensors_of(value: object, state: object) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the `state` of an object, but for the average of a model (a model under the name that its state
    has there), and buffers of its models, such as those of batch norm.
    """
    inside = [each for each in getattr(value, "__dict__", {}).values() if isinstance(each, nn.Module)]
    buffers = {each.data_ptr() for model in inside for each in model.buffers() if each.layout == torch.strided}
    for path, tensor in tensors_in(state):
        is_average = bool(path) and isinstance(path[0], str) and isinstance(getattr(value, path[0], None), nn.Module)
        if not is_average and (tensor.layout != torch.strided or local_part(tensor).data_ptr() not in buffers):
            yield path_text(path), tensor


def _prints(named: Iterable[tuple[str, torch.Tensor]], num_ranks: int, num_samples: int) -> dict[str, Print]:
    samples: dict[str, tuple[str, torch.Tensor]] = {}
    for name, tensor in named:
        mesh = mesh_of(tensor)
        local = local_part(tensor)
        if mesh is not None and mesh.size() == num_ranks:
            continue
        if local.layout != torch.strided or not local.numel() or is_made_of_others(local):
            continue
        place = f" from {local_box(name, tensor).offsets}" if mesh is not None else ""
        samples[name + place] = f"{tuple(tensor.shape)} {tensor.dtype}", _sample(local, num_samples)
    return _printed(samples)


def refuse_lost(
    everyone: Sequence[dict[str, dict[str, Print]]], models: Collection[str], *, is_united: bool = False
) -> None:
    """Refuse to save objects of which a part would be lost; `models` are the names of those that are models.

    With `is_united`, names that only some ranks have are saved (into a folder).

    Raises:
        CheckpointError: an object has different tensors on two ranks; the message names one, and both ranks.
    """
    for name in sorted({name for prints in everyone for name in prints}):
        of_ranks = [prints.get(name, {}) for prints in everyone]
        for key in dict.fromkeys(key for prints in of_ranks for key in prints):
            if lost := _lost(key, of_ranks, is_united):
                way_out = _WAY_OUT if name in models else _WAY_OUT_OF_OTHERS.format(name)
                raise CheckpointError(f"Nothing was saved or changed, since {f'{name}/{key}'!r} {lost}: {way_out}")


def _lost(key: str, of_ranks: Sequence[dict[str, Print]], is_united: bool) -> str | None:
    """How the tensor `key` differs between ranks, so that a part of it would be lost; None if it does not."""
    holders = [rank for rank, prints in enumerate(of_ranks) if key in prints]
    # A part of a tensor that is sharded over some of the ranks is not on the others.
    if " from (" not in key and not is_united and len(holders) < len(of_ranks):
        lacking = next(rank for rank in range(len(of_ranks)) if rank not in holders)
        return f"is on rank {holders[0]}, but not on rank {lacking}"
    first = of_ranks[holders[0]][key]
    other = next((rank for rank in holders if of_ranks[rank][key] != first), None)
    return None if other is None else f"of rank {other} is not that of rank {holders[0]}"


_WAY_OUT_OF_OTHERS = (
    "a checkpoint keeps one tensor for a name, so the other is lost. If each rank has a state of its own, say so by "
    "{{{0!r}: PerRank(...)}} (dengine.checkpoint.PerRank), and all are kept; if it is one state, make it the same on "
    "all ranks before the save, as by distributed.all_reduce()."
)

_WAY_OUT = (
    "a checkpoint keeps one tensor for a name, so the other is lost. If the ranks train one model, have "
    "prepare_model() or DDP keep it the same; if each has a part of its own (stages of a pipeline, experts), say "
    'so by prepare_model(..., parts="pp"), and all parts are kept.'
)


def _kept_equal(model: nn.Module, num_ranks: int) -> Iterator[int]:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.process_group.size() == num_ranks:
            yield from map(id, module.parameters())


def _sample(local: torch.Tensor, num_samples: int) -> torch.Tensor:
    """The bytes of some elements. Shapes: result (n,) uint8."""
    flat = local.detach().reshape(-1)
    step = max(1, flat.numel() // num_samples)
    return flat[::step][:num_samples].contiguous().view(torch.uint8)


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
