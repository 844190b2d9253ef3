"""Check that copies of a tensor, or of a piece of one, have the same bits on all ranks."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dengine.checks import is_number, is_whole_number
from dengine.comm.collectives import all_gather_object, max_tensor
from dengine.comm.consistency import text_digest
from dengine.comm.parts import Dimensions
from dengine.control.failure import in_brackets
from dengine.dtensor import is_dtensor, local_part, piece_of
from dengine.errors import ConsistencyError
from dengine.launch.world import World, world
from dengine.splitmix64 import mixed

__all__ = ["compare_tensors", "tensor_digest"]

_CHUNK = 1 << 20  # elements that are mixed at a time: what a digest takes of memory
_MOST_EXACT = 1 << 53  # of whole numbers in float64
_MOST_NAMED = 8  # ranks in one message


def compare_tensors(named: Mapping[str, object], subject: str, apart: Mapping[str, Dimensions]) -> None:
    """Raise if a tensor or number differs between the ranks that have a copy of it, bit by bit.

    A sharded tensor (DTensor) is compared piece by piece between the ranks that hold the same piece: the replicas of
    HSDP, the copies of a tensor-parallel group. A tensor of which every rank has a different piece is not compared.

    Args:
        named: the same names on all ranks, except those in `apart`.
        apart: for some names, the dimensions of the world's mesh along which ranks have different parts of a model on
            purpose, so that ranks that differ in them have no copies.

    Collective: call on all ranks. Cost: reads every tensor once, one all-reduce, one wait for the device; a gather if
    something differs. The all-reduce is of 16 bytes for each tensor or piece that is not apart and, on the mesh of
    `process_group(mesh=)`, for each way in which ranks can share something.

    Raises:
        ConsistencyError: on every rank, naming a rank that is not with the majority, and the first name that differs.
            Without a majority it names all ranks that have it.
    """
    here = world()
    slots, num_slots = _slots(named, apart, here)
    own_slots = torch.tensor(list(slots.values()), dtype=torch.int64)
    names = torch.tensor([text_digest([name]) for name in slots], dtype=torch.int64)
    digests_P = mixed(_digests(named[name] for name in slots) ^ names)
    sums = torch.zeros(num_slots, dtype=torch.int64).index_add_(0, own_slots, digests_P)
    both = torch.full((2, num_slots), torch.iinfo(torch.int64).min)  # what this rank does not hold counts for nothing
    own = sorted(set(slots.values()))
    both[:, own] = torch.stack([sums[own], -sums[own]])
    both = max_tensor(both, here, what="the comparison of tensors")
    if bool((both[0] == -both[1]).all()):
        return
    gathered = all_gather_object(dict(zip(slots.items(), digests_P.tolist(), strict=True)))
    holders: dict[int, list[int]] = {}
    for rank, theirs in enumerate(gathered):
        for slot in {slot for _, slot in theirs}:
            holders.setdefault(slot, []).append(rank)
    for key in dict.fromkeys(key for theirs in gathered for key in theirs):
        name, slot = key
        _refuse_odd_one({rank: gathered[rank].get(key) for rank in holders[slot]}, name, subject, here)


def _slots(named: Mapping[str, object], apart: Mapping[str, Dimensions], here: World) -> tuple[dict[str, int], int]:
    """A number for each of `named` with copies, which only the ranks with these share; and the number of numbers.

    Tensors that all ranks have by the same names are counted. Those that are apart share the number of all others on
    the same ranks, since their number on other ranks is unknown.
    """
    pieces = {name: piece_of(value) for name, value in named.items() if name not in apart}
    counted = {name: piece for name, piece in pieces.items() if piece[1] < here.size}
    starts = list(accumulate((num_pieces for _, num_pieces in counted.values()), initial=0))
    slots = {name: start + piece for (name, (piece, _)), start in zip(counted.items(), starts, strict=False)}
    slots |= {name: starts[-1] + _class_of(named[name], dims, here) for name, dims in apart.items()}
    num_classes = 0 if here.mesh is None else math.prod(1 + size for size in here.mesh.shape)
    return slots, starts[-1] + num_classes


def _class_of(value: object, apart: Dimensions, here: World) -> int:
    """A number for the ranks with the same tensor as this one, from the dimensions along which ranks differ."""
    assert here.mesh is not None  # of which `apart` are dimensions
    cut = {*apart, *_cut_along(value, here)}
    number = 0
    for (name, place), size in zip(here.coordinates.items(), here.mesh.shape, strict=True):
        number = number * (1 + size) + (1 + place if name in cut else 0)
    return number


def _cut_along(value: object, here: World) -> set[str]:
    """The dimensions of the world's mesh over which a DTensor is cut up.

    Its own mesh may have joined them, or may be made by the user.
    """
    found: set[str] = set()
    if is_dtensor(value) and here.mesh is not None:
        for dim, placement in enumerate(value.placements):
            if not placement.is_replicate():
                ranks = dist.get_process_group_ranks(value.device_mesh.get_group(dim))
                # Of a line or an area of the mesh, the first and the last differ along all its dimensions.
                first, last = ((here.mesh.mesh == rank).nonzero()[0] for rank in (ranks[0], ranks[-1]))
                found |= {name for name, is_other in zip(here.coordinates, first != last, strict=True) if is_other}
    return found


def _refuse_odd_one(digests: Mapping[int, int | None], name: str, subject: str, here: World) -> None:
    """Raise if the `digests`, by rank, are not all the same. None: the rank does not have it."""
    # Of equals the first, so that the lowest rank comes second in the message.
    commonest, count = Counter(digests.values()).most_common(1)[0]
    if count == len(digests):
        return
    others = [rank for rank, value in digests.items() if value != commonest]
    common = [rank for rank, value in digests.items() if value == commonest]
    named = _listed(common[:1], here)
    if 2 * count <= len(digests):
        named = f"{_listed(common, here)}. There is no majority among the copies, so any of these may be the wrong one"
    raise ConsistencyError(
        f"{subject} differ between ranks: {name!r} of rank {_listed(others, here)} is not that of rank {named}. Were "
        "they changed on one rank only, or outside of the optimizer?"
    )


def _listed(ranks: Sequence[int], here: World) -> str:
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return ", ".join(f"{rank}{in_brackets(here.place_of(rank))}" for rank in ranks[:_MOST_NAMED]) + more


def _digests(values: Iterable[Any]) -> torch.Tensor:
    """One int64 for each value. Shapes: result (P,), on the CPU."""
    digests = [tensor_digest(value if isinstance(value, torch.Tensor) else _number(value)) for value in values]
    on_host = torch.zeros(len(digests), dtype=torch.int64)
    for device in dict.fromkeys(each.device for each in digests):
        indices = [index for index, each in enumerate(digests) if each.device == device]
        # One copy for each device: each tensor by itself would wait for it.
        on_host[indices] = torch.stack([digests[index] for index in indices]).cpu()
    return on_host


def _number(value: Any) -> torch.Tensor:
    # A float by its bits, so that NaN, infinities and the sign of zero count; an int that no float equals, as text.
    if is_number(value) and (not is_whole_number(value) or abs(value) <= _MOST_EXACT):
        return torch.tensor(float(value), dtype=torch.float64)
    return torch.tensor(list(repr(value).encode()), dtype=torch.uint8)


def tensor_digest(tensor: torch.Tensor) -> torch.Tensor:
    """A digest of 64 bits, which changes with any bit of the tensor. Shapes: result () int64, on the tensor's
    device.
    """
    with torch.no_grad():
        data = local_part(tensor).contiguous().reshape(-1).view(torch.uint8)
        words = nn.functional.pad(data, (0, -data.numel() % 8)).view(torch.int64)
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for start in range(0, words.numel(), _CHUNK):
            chunk = words[start : start + _CHUNK]
            positions = torch.arange(start, start + chunk.numel(), device=words.device)
            total = total + mixed(chunk ^ mixed(positions)).sum()
        return total
