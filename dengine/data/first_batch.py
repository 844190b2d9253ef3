"""Check that ranks that share their data got the same first batch of a run, and that others did not."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from dengine import trees
from dengine.comm.collectives import all_gather_object, max_tensor
from dengine.comm.consistency import text_digest
from dengine.comm.copies import tensor_digest
from dengine.dtensor import is_dtensor
from dengine.errors import ConsistencyError
from dengine.launch.world import World, world

__all__ = ["Duplicates", "compare_first_batch"]

_NUM_SHOWN = 3  # values of a tensor, in a message
_LEAST = torch.iinfo(torch.int64).min
_NUM_ROWS, _NUM_VALUES = 64, 4096  # that are looked at
_FEW_VALUES, _FEW_VALUES_OF_ONE = 16, 64  # that several samples, or one, may have by chance
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class _Leaf(NamedTuple):
    """A part of a batch: the text that a message shows, and a digest of all of it."""

    shown: str
    digest: int


class Duplicates(NamedTuple):
    """The comparison of the first batches: whether any rank has one, and two ranks that should have other ones."""

    has_any: bool
    ranks: tuple[int, int] | None


def compare_first_batch(first: Sequence[object], in_doubt: Sequence[object], *, is_shared: bool) -> Duplicates:
    """Compare the first batch between the ranks that share their data (`is_shared`: some do), and `in_doubt` between
    all others.

    `first` is empty on a rank without a batch. `in_doubt` is what of it should be no other rank's, as far as nobody has
    made sure; what could be the same by chance does not count. Parts of a batch other than containers, tensors, arrays
    and plain values are compared by their type alone, and a DTensor by its shape.

    Collective. Cost: one all-reduce of 32 bytes for each part of the data; reads a batch that is compared (a wait for
    the device, if it is there).

    Raises:
        ConsistencyError: on every rank, naming two ranks whose batches differ, and the first difference.
    """
    here = world()
    mine = [leaf for batch in first for leaf in _leaves_of(batch)] if is_shared else []
    digest = _digest(mine)
    numbers = torch.full((1 + 4 * here.data_size,), _LEAST)
    numbers[0] = len(first)
    own = numbers[1:].view(-1, 4)[here.data_rank]
    own[:2] = torch.tensor([digest, -digest])
    if _tells(in_doubt):
        own[2:] = torch.tensor([_digest([leaf for batch in in_doubt for leaf in _leaves_of(batch)]), -here.rank])
    what = "the comparison of the first batch" if is_shared else "whether any rank has a batch"
    found = max_tensor(numbers, here, what=what)
    parts = found[1:].view(-1, 4)
    if not bool((parts[:, 0] == -parts[:, 1]).all()):  # all are equal if the largest is the smallest
        _refuse(all_gather_object((here.data_rank, mine)), here)
    return Duplicates(bool(found[0]), _first_pair(parts[:, 2:].tolist()))


def _first_pair(of_parts: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Two ranks with the same digest, from (digest, -rank) of each part of the data."""
    seen: dict[int, int] = {}
    for digest, negative in of_parts:
        if digest == _LEAST:
            continue
        if digest in seen:
            return seen[digest], -negative
        seen[digest] = -negative
    return None


def _tells(batches: Sequence[object]) -> bool:
    """Whether another rank with the same batch has the same data: it holds several samples that differ, of more than a
    few values. Labels, constant data and a single short sample could be the same by chance.
    """
    num_samples, values = 1, set[Any]()
    for batch in batches:
        for _, value in trees.named_leaves(batch):
            if isinstance(value, torch.Tensor) and not is_dtensor(value) and value.layout == torch.strided:
                value = value.detach()[:_NUM_ROWS].cpu()
                value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
            if isinstance(value, np.ndarray) and value.ndim:
                rows = value[:_NUM_ROWS]
                num_samples = max(num_samples, len({np.ascontiguousarray(row).tobytes() for row in rows}))
                values.update(rows.reshape(-1)[:_NUM_VALUES].tolist())
            elif isinstance(value, _PLAIN):
                values.add(value)
    return len(values) >= (_FEW_VALUES if num_samples > 1 else _FEW_VALUES_OF_ONE)


def _digest(leaves: Sequence[_Leaf]) -> int:
    return text_digest([f"{leaf.shown} {leaf.digest}" for leaf in leaves])


def _refuse(gathered: Sequence[tuple[int, list[_Leaf]]], here: World) -> None:
    """Raises: ConsistencyError: about two ranks with the same part of the data."""
    firsts: dict[int, int] = {}  # by the part of the data, the first rank that has it
    for rank, (part, theirs) in enumerate(gathered):
        first = firsts.setdefault(part, rank)
        if theirs != gathered[first][1]:
            raise ConsistencyError(
                f"Rank {rank} ({here.place_of(rank)}) and rank {first} ({here.place_of(first)}) must be given the same "
                "data, as they differ in cp, tp or pp alone, but their first batches differ: "
                f"{_difference(rank, theirs, first, gathered[first][1])}. Pass the loader to prepare_data_loader() "
                "with the same arguments on every rank, or choose the samples by world().data_rank and data_size: a "
                "stream that asks for RANK or torch.distributed.get_rank() by itself must be given those instead."
            )


def _difference(rank: int, theirs: Sequence[_Leaf], first: int, of_first: Sequence[_Leaf]) -> str:
    for leaf, other in zip(theirs, of_first, strict=False):
        if leaf.shown != other.shown:
            return f"rank {rank} has {leaf.shown}, rank {first} has {other.shown}"
        if leaf.digest != other.digest:
            return f"both have {leaf.shown}, but other values after that"
    return f"rank {rank} has {len(theirs)} parts of it, rank {first} {len(of_first)}"


def _leaves_of(batch: object) -> Iterator[_Leaf]:
    for name, value in trees.named_leaves(batch):
        start = f"{name}: " if name else ""
        if isinstance(value, torch.Tensor):
            yield _leaf_of_tensor(start, value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
            digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            yield _Leaf(f"{start}{value.dtype} {value.shape} that begins {_beginning(value)}", text_digest([digest]))
        elif isinstance(value, _PLAIN):
            yield _Leaf(f"{start}{value!r:.60}", text_digest([repr(value)]))
        else:
            yield _Leaf(f"{start}a {type(value).__qualname__}", 0)


def _beginning(values: "torch.Tensor | np.ndarray[Any, Any]") -> str:
    return ", ".join(map(str, values.reshape(-1)[:_NUM_SHOWN].tolist()))


def _leaf_of_tensor(start: str, value: torch.Tensor) -> _Leaf:
    kind = f"{start}{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if is_dtensor(value):  # whose parts differ between ranks on purpose
        return _Leaf(kind, 0)
    with suppress(RuntimeError, NotImplementedError, TypeError, ValueError):  # a sparse or nested tensor: by its shape
        return _Leaf(f"{kind} that begins {_beginning(value)}", int(tensor_digest(value)))
    return _Leaf(kind, 0)
