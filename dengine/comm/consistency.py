"""Check that the ranks hold the same: names and shapes before each run, and parameters bit by bit on request."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from dengine.checks import is_number
from dengine.comm.collectives import all_gather_object, max_tensor
from dengine.control.deadlock import START_OF_RUN
from dengine.control.plane import plane
from dengine.dtensor import local_part, piece_of
from dengine.errors import ConsistencyError
from dengine.launch.world import world
from dengine.splitmix64 import mixed

__all__ = [
    "Compared",
    "Start",
    "any_rank",
    "compare_start",
    "compare_tensors",
    "parameters_of",
    "prepared_parameters",
    "refuse_differences",
    "refuse_different_models",
    "refuse_different_parts",
    "same_on_all_ranks",
    "tensor_digest",
    "text_digest",
]

_BUILD_ALIKE = "Build the same on every rank."
_CHUNK = 1 << 20  # elements that are mixed at a time: what a digest takes of memory


class Compared(NamedTuple):
    """Entries that must be the same on all ranks, and the advice if they are not.

    `may_lack`: a rank without any entry is skipped, as it has nothing of this kind.
    """

    subject: str
    entries: Sequence[str]
    advice: str = _BUILD_ALIKE
    may_lack: bool = False


class Start(NamedTuple):
    """The result of the comparison of the ranks at the start of a run.

    Attributes:
        is_same: all ranks have the same entries.
        most_batches: the largest number of batches that a rank gave.
        is_same_data: all ranks go through the same samples, as far as their descriptions show.
    """

    is_same: bool
    most_batches: int
    is_same_data: bool


def compare_start(entries: Sequence[str], *, batches: int = 0, data: str = "") -> Start:
    """Compare `entries` and `data`, and find the largest `batches`. Collective. Cost: an all-reduce of 5 numbers."""
    mine, samples = text_digest(entries), text_digest([data])
    numbers = torch.tensor([mine, -mine, samples, -samples, batches])
    found = max_tensor(numbers, world(), what=START_OF_RUN).tolist()
    # All are equal if the largest is the smallest.
    return Start(found[0] == -found[1], found[4], found[2] == -found[3])


def same_on_all_ranks(entries: Sequence[str], what: str) -> bool:
    """Whether all ranks give the same `entries`. Collective. Cost: an all-reduce of 2 numbers."""
    mine = text_digest(entries)
    both = max_tensor(torch.tensor([mine, -mine]), world(), what=what)
    return bool(both[0] == -both[1])


def any_rank(value: bool, what: str) -> bool:
    """Whether `value` is true on any rank. Collective. Cost: an all-reduce of one number."""
    return bool(max_tensor(torch.tensor([int(value)]), world(), what=what)[0])


def text_digest(entries: Sequence[str]) -> int:
    """A digest of `entries` with 63 bits."""
    return int.from_bytes(hashlib.sha256("\n".join(entries).encode()).digest()[:8], "big") >> 1


def refuse_differences(compared: Sequence[Compared]) -> None:
    """Raise if the entries differ between ranks. Collective. Cost: one object gather.

    Raises:
        ConsistencyError: on every rank, naming a rank that is not with the majority, and the first entry that differs.
    """
    gathered = all_gather_object([list(each.entries) for each in compared])
    for slot, each in enumerate(compared):
        entries = {rank: theirs[slot] for rank, theirs in enumerate(gathered) if theirs[slot] or not each.may_lack}
        _refuse(entries, each.subject, each.advice)


def refuse_different_parts(compared: Compared, place: int) -> None:
    """Raise if the entries differ between ranks with the same `place`, which have the same part of a model.

    Collective. Cost: one object gather. Raises: ConsistencyError: as `refuse_differences`.
    """
    gathered = all_gather_object((place, list(compared.entries)))
    for each in sorted({theirs for theirs, _ in gathered}):
        of_place = {rank: entries for rank, (theirs, entries) in enumerate(gathered) if theirs == each}
        _refuse(of_place, compared.subject, compared.advice)


def refuse_different_models(parameters: Mapping[int, Sequence[str]]) -> None:
    """Raise if the `parameters` of a prepared model differ between ranks; `parameters` has them by the model's number.

    A model that a garbage collector has taken on some rank is skipped. Collective. Cost: one object gather.

    Raises:
        ConsistencyError: as `refuse_differences`.
    """
    gathered = all_gather_object(dict(parameters))
    common = sorted(set.intersection(*map(set, gathered)))
    entries = {rank: [entry for number in common for entry in each[number]] for rank, each in enumerate(gathered)}
    _refuse(entries, "The parameters of the models", _BUILD_ALIKE)


def _refuse(gathered: Mapping[int, Sequence[str]], subject: str, advice: str) -> None:
    ranks = list(gathered)
    if not ranks:
        return
    odd, common = _odd_one(["\n".join(each) for each in gathered.values()])
    if odd is None:
        return
    rank, model = ranks[odd], ranks[common]
    for mine, theirs in zip(gathered[model], gathered[rank], strict=False):
        if mine != theirs:
            raise ConsistencyError(
                f"{subject} differ between ranks: rank {rank} has {theirs}, but rank {model} has {mine}. {advice}"
            )
    shorter, longer = sorted((rank, model), key=lambda each: len(gathered[each]))
    raise ConsistencyError(
        f"{subject} differ between ranks: rank {rank} has {len(gathered[rank])} of them, rank {model} has "
        f"{len(gathered[model])}. Rank {longer} has {gathered[longer][len(gathered[shorter])]}, which rank {shorter} "
        f"has not. {advice}"
    )


def prepared_parameters() -> dict[int, list[str]]:
    """Names, shapes and types of the parameters of each prepared model that is still alive, by the model's number."""
    return {number: parameters_of(model) for number, model in plane().prepared.living_models().items()}


def parameters_of(model: nn.Module) -> list[str]:
    return [f"{name} {list(value.shape)} {value.dtype}" for name, value in model.named_parameters()]


def compare_tensors(named: Mapping[str, Any], subject: str) -> None:
    """Raise if a tensor or number differs between ranks, bit by bit.

    A sharded tensor (DTensor) is compared piece by piece between the ranks that hold the same piece: the replicas of
    HSDP, the copies of a tensor-parallel group. A tensor of which every rank has a different piece is not compared.

    Collective: call on all ranks with the same names. Cost: reads every tensor once, one all-reduce of 16 bytes for
    each tensor or piece, one wait for the device; a gather if something differs.

    Raises:
        ConsistencyError: on every rank, naming a rank that is not with the majority, and the first name that differs.
    """
    pieces = {name: piece_of(value) for name, value in named.items()}
    compared = {name: piece for name, piece in pieces.items() if piece[1] < world().size}
    starts = list(accumulate((num_pieces for _, num_pieces in compared.values()), initial=0))
    slots = [
        start + piece for start, (piece, _) in zip(starts, compared.values(), strict=False)
    ]  # a slot for each piece
    digests_P = _digests(named[name] for name in compared)
    both = torch.full((2, starts[-1]), torch.iinfo(torch.int64).min)  # the least value
    both[:, slots] = torch.stack([digests_P, -digests_P])
    both = max_tensor(both, world(), what=f"the comparison of {len(compared)} tensors")
    if bool((both[0] == -both[1]).all()):
        return
    gathered = all_gather_object(dict(zip(slots, digests_P.tolist(), strict=True)))
    for name, start, end in zip(compared, starts, starts[1:], strict=False):
        for slot in range(start, end):
            _refuse_odd_one({rank: each[slot] for rank, each in enumerate(gathered) if slot in each}, name, subject)


def _refuse_odd_one(digests: Mapping[int, int], name: str, subject: str) -> None:
    """Raise if the `digests`, by rank, are not all the same."""
    odd, common = _odd_one(list(digests.values()))
    if odd is None:
        return
    ranks = list(digests)
    others = [rank for rank, value in digests.items() if value != digests[ranks[common]]]
    raise ConsistencyError(
        f"{subject} differ between ranks: {name!r} of rank {', '.join(map(str, others))} is not that of rank "
        f"{ranks[common]}. Were they changed on one rank only, or outside of the optimizer?"
    )


def _odd_one(values: Sequence[Any]) -> tuple[int | None, int]:
    """The index of a value that is not the most frequent one (None if all are equal), and the index of one that is."""
    if not values:
        return None, 0
    commonest, _ = Counter(values).most_common(1)[0]  # of equals the first, so that rank 0 is right in doubt
    odd = next((rank for rank, value in enumerate(values) if value != commonest), None)
    return odd, values.index(commonest)


def _digests(values: Iterable[Any]) -> torch.Tensor:
    """One int64 for each value. Shapes: result (P,), on the CPU."""
    digests = [tensor_digest(value if isinstance(value, torch.Tensor) else _number(value)) for value in values]
    # In one copy a device: each by itself would wait for it.
    return torch.stack([each.cpu() for each in digests]) if digests else torch.zeros(0, dtype=torch.int64)


def _number(value: Any) -> torch.Tensor:
    if is_number(value):
        return torch.tensor(float(value) if math.isfinite(value) else math.inf, dtype=torch.float64)
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
