"""Whether the ranks hold the same: names and shapes before a run, the parameters themselves where that is asked for."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dengine.distributed.collectives import all_gather_object, max_tensor
from dengine.distributed.control import Control
from dengine.distributed.world import control, world
from dengine.errors import ConsistencyError

__all__ = [
    "compare_tensors",
    "parameters_of",
    "prepared_parameters",
    "refuse_difference",
    "refuse_different_models",
    "same_on_all_ranks",
]

_CHUNK = 1 << 20  # elements that are mixed at a time: what a digest takes of memory
_MIXERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # odd, as in splitmix64


def same_on_all_ranks(entries: Sequence[str]) -> bool:
    """Whether all ranks give the same `entries`. Collective. Cost: an all-reduce of 2 numbers."""
    digest = int.from_bytes(hashlib.sha256("\n".join(entries).encode()).digest()[:8], "big") >> 1
    # All are equal where the largest is the smallest.
    both = max_tensor(torch.tensor([digest, -digest]), world(), what="the comparison at the start of a run")
    return bool(both[0] == -both[1])


def refuse_difference(entries: Sequence[str], subject: str) -> None:
    """Raise where `entries` differ between ranks. Collective. Cost: one object gather.

    Raises:
        ConsistencyError: on every rank, naming a rank that is not with the majority, and the first entry that differs.
    """
    _refuse(all_gather_object(list(entries)), subject)


def refuse_different_models(parameters: Mapping[int, Sequence[str]]) -> None:
    """Raise where the `parameters` of a prepared model, by its number, differ between ranks. One that is gone on some
    rank is passed over: when a garbage collector has come to it says nothing. Collective. Cost: one object gather.

    Raises:
        ConsistencyError: as `refuse_difference`.
    """
    told = all_gather_object(dict(parameters))
    common = sorted(set.intersection(*map(set, told)))
    _refuse([[entry for number in common for entry in each[number]] for each in told], "The parameters of the models")


def _refuse(told: Sequence[Sequence[str]], subject: str) -> None:
    rank, model = _odd_one(["\n".join(each) for each in told])
    if rank is None:
        return
    for mine, theirs in zip(told[model], told[rank], strict=False):
        if mine != theirs:
            raise ConsistencyError(
                f"{subject} differ between ranks: rank {rank} has {theirs}, where rank {model} has {mine}. Build the "
                "same on every rank."
            )
    raise ConsistencyError(
        f"{subject} differ between ranks: rank {rank} has {len(told[rank])} of them, rank {model} has "
        f"{len(told[model])}. Build the same on every rank."
    )


def prepared_parameters() -> dict[int, list[str]]:
    """Names, shapes and types of the parameters of all models that were prepared and still live, by their number."""
    plane = control()
    if not isinstance(plane, Control):
        return {}
    return {number: parameters_of(model) for number, model in plane.living_models().items()}


def parameters_of(model: nn.Module) -> list[str]:
    return [f"{name} {list(value.shape)} {value.dtype}" for name, value in model.named_parameters()]


def compare_tensors(named: Mapping[str, Any], subject: str) -> None:
    """Raise where a tensor or number differs between ranks, bit by bit. What is sharded (FSDP2) is passed over.

    Collective: call on all ranks with the same names. Cost: reads every tensor once, one all-reduce of 16 bytes a
    tensor, one wait for the device; a gather where something differs.

    Raises:
        ConsistencyError: on every rank, naming a rank that is not with the majority, and the first name that differs.
    """
    whole = {name: value for name, value in named.items() if not _is_sharded(value)}
    digests_P = _digests(whole.values())
    both = torch.stack([digests_P, -digests_P])
    both = max_tensor(both, world(), what=f"the comparison of {len(whole)} tensors")
    if bool((both[0] == -both[1]).all()):
        return
    told = all_gather_object(digests_P.tolist())
    for place, name in enumerate(whole):
        values = [digests[place] for digests in told]
        rank, model = _odd_one(values)
        if rank is not None:
            others = [each for each, value in enumerate(values) if value != values[model]]
            raise ConsistencyError(
                f"{subject} differ between ranks: {name!r} of rank {', '.join(map(str, others))} is not that of rank "
                f"{model}. Were they changed on one rank only, or outside of the optimizer?"
            )


def _odd_one(values: Sequence[Any]) -> tuple[int | None, int]:
    """A rank whose value is not the commonest, and one whose value is; None where all are the same."""
    commonest, _ = Counter(values).most_common(1)[0]  # of equals the first, so that rank 0 is right in doubt
    odd = next((rank for rank, value in enumerate(values) if value != commonest), None)
    return odd, values.index(commonest)


def _is_sharded(value: Any) -> bool:
    placements = getattr(value, "placements", ())
    return any(not placement.is_replicate() for placement in placements)


def _digests(values: Iterable[Any]) -> torch.Tensor:
    """One int64 for each value. Shapes: result (P,), on the CPU."""
    digests = [_digest(value if isinstance(value, torch.Tensor) else _number(value)) for value in values]
    # In one copy a device: each by itself would wait for it.
    return torch.stack([each.cpu() for each in digests]) if digests else torch.zeros(0, dtype=torch.int64)


def _number(value: Any) -> torch.Tensor:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value) if math.isfinite(value) else math.inf, dtype=torch.float64)
    return torch.tensor(list(repr(value).encode()), dtype=torch.uint8)


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """64 bits that any changed bit changes. Shapes: result () int64, on the tensor's device."""
    with torch.no_grad():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        data = local.detach().contiguous().reshape(-1).view(torch.uint8)
        words = nn.functional.pad(data, (0, -data.numel() % 8)).view(torch.int64)
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for start in range(0, words.numel(), _CHUNK):
            chunk = words[start : start + _CHUNK]
            places = torch.arange(start, start + chunk.numel(), device=words.device)
            total = total + _mixed(chunk ^ _mixed(places)).sum()
        return total


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Each word's bits spread over all 64, one to one. Source: the finalizer of splitmix64 (Steele et al. 2014)."""
    words = words * _MIXERS[0]
    words = (words ^ (words >> 30)) * _MIXERS[1]
    words = (words ^ (words >> 27)) * _MIXERS[2]
    return words ^ (words >> 31)
