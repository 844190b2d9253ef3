"""Check that the ranks have the same models, metrics, data and handlers, before each run."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from dengine.comm.collectives import gather_objects, max_tensor
from dengine.comm.parts import named_parameters_beside_parts
from dengine.control.deadlock import START_OF_RUN
from dengine.control.plane import plane
from dengine.errors import ConsistencyError
from dengine.launch.world import World, world

__all__ = [
    "Compared",
    "Start",
    "compare_start",
    "gather_distinct",
    "parameters_of",
    "prepared_parameters",
    "refuse_differences",
    "refuse_different_models",
    "refuse_different_parts",
    "same_on_all_ranks",
    "text_digest",
]

T = TypeVar("T")

_BUILD_ALIKE = "Build the same on every rank."


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


def gather_distinct(value: T, here: World) -> list[T]:
    """Every rank's `value`, in the order of ranks. Ranks whose values have the same `repr` get one object for all.

    Collective. Cost: an object gather of one number; if they differ, another one of the values, each of which one rank
    sends.
    """
    mine = text_digest([repr(value)])
    digests = gather_objects(mine, here)
    if all(digest == mine for digest in digests):
        return [value] * here.size
    senders = {digest: rank for rank, digest in reversed([*enumerate(digests)])}  # the first rank that has it
    sent = gather_objects(value if senders[mine] == here.rank else None, here)
    return [sent[senders[digest]] for digest in digests]  # type: ignore[misc]


def text_digest(entries: Sequence[str]) -> int:
    """A digest of `entries` with 63 bits."""
    return int.from_bytes(hashlib.sha256("\n".join(entries).encode()).digest()[:8], "big") >> 1


def refuse_differences(compared: Sequence[Compared]) -> None:
    """Raise if the entries differ between ranks. Collective. Cost: as `gather_distinct`.

    Raises:
        ConsistencyError: on every rank, naming a rank that is not with the majority, and the first entry that differs.
    """
    gathered = gather_distinct([list(each.entries) for each in compared], world())
    for slot, each in enumerate(compared):
        entries = {rank: theirs[slot] for rank, theirs in enumerate(gathered) if theirs[slot] or not each.may_lack}
        _refuse(entries, each.subject, each.advice)


def refuse_different_parts(compared: Compared, place: tuple[int, ...]) -> None:
    """Raise if the entries differ between ranks with the same `place`, which have the same part of a model.

    Collective. Cost: as `gather_distinct`. Raises: ConsistencyError: as `refuse_differences`.
    """
    gathered = gather_distinct((place, list(compared.entries)), world())
    for each in sorted({theirs for theirs, _ in gathered}):
        of_place = {rank: entries for rank, (theirs, entries) in enumerate(gathered) if theirs == each}
        _refuse(of_place, compared.subject, compared.advice)


def refuse_different_models(parameters: Mapping[int, Sequence[str]]) -> None:
    """Raise if the `parameters` of a prepared model differ between ranks; `parameters` has them by the model's number.

    A model that a garbage collector has taken on some rank is skipped. Collective. Cost: as `gather_distinct`.

    Raises:
        ConsistencyError: as `refuse_differences`.
    """
    gathered = gather_distinct(dict(parameters), world())
    distinct = {id(each): each for each in gathered}
    common = sorted(set.intersection(*map(set, distinct.values())))
    entries = {key: [entry for number in common for entry in each[number]] for key, each in distinct.items()}
    _refuse(
        {rank: entries[id(each)] for rank, each in enumerate(gathered)}, "The parameters of the models", _BUILD_ALIKE
    )


def _refuse(gathered: Mapping[int, Sequence[str]], subject: str, advice: str) -> None:
    ranks = list(gathered)
    if not ranks:
        return
    texts = {id(each): "\n".join(each) for each in gathered.values()}
    odd, common = _odd_one([texts[id(each)] for each in gathered.values()])
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
        f"does not have. {advice}"
    )


def prepared_parameters() -> dict[int, list[str]]:
    """Names, shapes and types of the parameters of each prepared model that is still alive, by the model's number."""
    return {number: parameters_of(model) for number, model in plane().prepared.living_models().items()}


def parameters_of(model: nn.Module) -> list[str]:
    """Name, shape and type of each parameter, but for those in parts inside `model`, which ranks have apart."""
    return [f"{name} {list(value.shape)} {value.dtype}" for name, value in named_parameters_beside_parts(model)]


def _odd_one(values: Sequence[Any]) -> tuple[int | None, int]:
    """The index of a value that is not the most frequent one (None if all are equal), and the index of one that is."""
    if not values:
        return None, 0
    commonest, _ = Counter(values).most_common(1)[0]  # in a tie the value of the lowest rank
    odd = next((rank for rank, value in enumerate(values) if value != commonest), None)
    return odd, values.index(commonest)
