"""All states of all metrics of an engine, reduced over the ranks in one all-reduce.

The states are laid into one float64 buffer: floats as they are; whole numbers as two halves of 32 bits, whose sums
float64 holds exactly, so that int64 counts stay exact; what must keep the ranks apart ("gather", lengths of "cat") as
one slot per rank, zero in everybody else's. States to be joined ("cat") follow in one padded gather, their lengths
being known by then; minima and maxima in one all-reduce of integers that are ordered as the numbers are.

What lies where is agreed upon before: once per engine, and again where a rank finds that its states have changed
(a number of classes inferred from the first batch), which it says in a lane of the buffer itself.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from dengine.distributed.collectives import all_gather_object, gather_bytes, max_tensor, sum_tensor
from dengine.distributed.world import World
from dengine.errors import MetricStateError
from dengine.metrics.metric import StateOp

__all__ = ["Item", "Reduction"]

_HEADER = 2  # lanes: ranks whose layout has changed, ranks that failed to give their states


@dataclass(frozen=True)
class Item:
    """One state on its way. Where this rank saw nothing, `value` is its default, and others tell dtype and shape."""

    metric: str  # as the user knows it: name and class
    state: str
    op: StateOp
    value: torch.Tensor
    is_seen: bool = True


@dataclass(frozen=True)
class _Entry:
    """What is agreed about one state. `shape` leaves out the first dimension of a "cat" state."""

    metric: str
    state: str
    op: StateOp
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_seen: bool

    @property
    def is_whole(self) -> bool:
        return not (self.dtype.is_floating_point or self.dtype.is_complex)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_open(self) -> bool:
        """Nobody can tell the shape yet."""
        return not self.is_seen and (self.op == "cat" or self.numel == 0)

    def lanes(self, size: int) -> int:
        """Places in the float64 buffer."""
        per_element = 2 if self.is_whole else 1
        return {
            "sum": self.numel * per_element,
            "gather": self.numel * per_element * size,
            "mean": self.numel + 1,  # and the number of ranks that saw anything
            "cat": size,  # the lengths
            "min": 0,
            "max": 0,
        }[self.op]


class Reduction:
    """Reduces the states of one set of metrics, remembering what the ranks have agreed upon."""

    def __init__(self) -> None:
        self._layout: tuple[_Entry, ...] | None = None

    def agree(self, items: Sequence[Item], failure: str | None = None) -> None:
        """Have the ranks compare their states: the same metrics, in the same order, of the same shapes.

        Collective. Cost: one object gather.

        Raises:
            MetricStateError: on every rank, naming the rank and the metric that differ, or a rank that failed.
        """
        mine = tuple(_entry(item) for item in items)
        self._layout = None
        told = all_gather_object((mine, failure))
        _raise_failures([rank_failure for _, rank_failure in told])
        self._layout = _merged([entries for entries, _ in told])

    @property
    def is_agreed(self) -> bool:
        return self._layout is not None

    def reduce(self, items: Sequence[Item], here: World, failure: str | None = None) -> list[torch.Tensor]:
        """The states reduced over `here`, in the order of `items`, on the CPU; "cat" states stay on the device.

        `failure` tells the others that this rank could not give its states. The items themselves are left alone.

        Collective. Cost: one all-reduce; one more where there are minima or maxima, one gather where there are "cat"
        states; one copy to the host.
        Raises: MetricStateError, as `agree` does.
        """
        if not items and failure is None:
            return []
        if here.size == 1:
            self._layout = tuple(_entry(item) for item in items)  # nobody to agree with
        elif self._layout is None or any(entry.is_open for entry in self._layout):
            self.agree(items, failure)
        for _ in range(2):
            assert self._layout is not None
            fitted = _fitted(items, self._layout)
            sent = _packed(fitted, self._layout, here, failure)
            host = sum_tensor(sent, here).cpu()
            if not host[:_HEADER].any():
                return _unpacked(host[_HEADER:], fitted or [], self._layout, here)
            self.agree(items, failure)
        raise MetricStateError("The metrics' states changed while they were being reduced.")  # pragma: no cover

    def fail(self, failure: str, here: World) -> None:
        """Let the others know, who wait in the reduction, that this rank cannot give its states. Collective."""
        with suppress(MetricStateError):
            self.reduce((), here, failure)


# -- agreeing ----------------------------------------------------------------------------------------------------


def _entry(item: Item) -> _Entry:
    value = item.value
    shape = tuple(value.shape[1:] if item.op == "cat" else value.shape)
    return _Entry(item.metric, item.state, item.op, value.dtype, shape, item.is_seen and value.numel() > 0)


def _merged(ranks: list[tuple[_Entry, ...]]) -> tuple[_Entry, ...]:
    """What all ranks can reduce by: from those that have seen data, as only they know shapes."""
    kinds = [[(entry.metric, entry.state, entry.op) for entry in entries] for entries in ranks]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise MetricStateError(_difference(rank, kind, kinds[0]))
    return tuple(_merged_entry(entries) for entries in zip(*ranks, strict=True))


def _merged_entry(entries: tuple[_Entry, ...]) -> _Entry:
    seen = [(rank, entry) for rank, entry in enumerate(entries) if entry.is_seen]
    if not seen:
        return entries[0]
    first_rank, first = seen[0]
    dtype = first.dtype
    for rank, entry in seen[1:]:
        if entry.shape != first.shape:
            raise MetricStateError(
                f"The ranks cannot add up {first.metric}: its state {first.state!r} has shape {entry.shape} on rank "
                f"{rank}, but {first.shape} on rank {first_rank}. Give it the same size everywhere (num_classes=)."
            )
        dtype = torch.promote_types(dtype, entry.dtype)
    return replace(first, dtype=dtype)


def _difference(rank: int, kind: list[tuple[str, str, StateOp]], first: list[tuple[str, str, StateOp]]) -> str:
    names, first_names = (list(dict.fromkeys(metric for metric, _, _ in one)) for one in (kind, first))
    if names != first_names:
        return (
            f"Rank {rank} has the metrics {', '.join(names) or 'none'}, but rank 0 has "
            f"{', '.join(first_names) or 'none'}: add the same metrics in the same order on every rank."
        )
    place = next(
        i for i, (mine, theirs) in enumerate(zip([*kind, None], [*first, None], strict=False)) if mine != theirs
    )
    mine, theirs = (one[place] if place < len(one) else one[-1] for one in (kind, first))
    return (
        f"{mine[0]} differs between ranks: rank {rank} has state {mine[1]!r} reduced by {mine[2]!r}, "
        f"rank 0 has state {theirs[1]!r} reduced by {theirs[2]!r}."
    )


def _raise_failures(failures: list[str | None]) -> None:
    failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        raise MetricStateError(
            "A metric could not be computed: " + "; ".join(f"on rank {rank}: {failure}" for rank, failure in failed)
        )


# -- packing -----------------------------------------------------------------------------------------------------


def _fitted(items: Sequence[Item], layout: tuple[_Entry, ...]) -> list[Item] | None:
    """The items in the agreed shapes, defaults widened to them; None where this rank's own have changed."""
    if [(item.metric, item.state, item.op) for item in items] != [(e.metric, e.state, e.op) for e in layout]:
        return None
    fitted = []
    for item, agreed in zip(items, layout, strict=True):
        mine = _entry(item)
        if mine.is_seen:
            if mine.shape != agreed.shape or torch.promote_types(mine.dtype, agreed.dtype) != agreed.dtype:
                return None
            fitted.append(item)
        elif item.op == "cat":
            fitted.append(replace(item, value=item.value.new_zeros((0, *agreed.shape))))
        elif mine.shape == agreed.shape:
            fitted.append(item)
        else:
            default = item.value.reshape(-1)[:1] if item.value.numel() else item.value.new_zeros(1)
            fitted.append(
                replace(item, value=default.expand(max(agreed.numel, 1))[: agreed.numel].reshape(agreed.shape))
            )
    return fitted


def _packed(items: list[Item] | None, layout: tuple[_Entry, ...], here: World, failure: str | None) -> torch.Tensor:
    """The float64 buffer of this rank. One that has nothing to give says so in the header and sends zeros."""
    length = sum(entry.lanes(here.size) for entry in layout)
    if items is None or failure is not None:
        lanes = torch.zeros(_HEADER + length, dtype=torch.float64)
        lanes[0], lanes[1] = float(items is None), float(failure is not None)
        return lanes.to(here.device)
    parts = [torch.zeros(_HEADER, dtype=torch.float64, device=here.device)]
    for item, entry in zip(items, layout, strict=True):
        parts += _lanes(item, entry, here)
    return torch.cat(parts)


def _lanes(item: Item, entry: _Entry, here: World) -> list[torch.Tensor]:
    if entry.op in ("min", "max"):
        return []
    if entry.op == "cat":
        return [_slots(torch.tensor([float(item.value.shape[0])], dtype=torch.float64, device=here.device), here)]
    value = item.value.detach().to(here.device).reshape(-1)
    if entry.op == "mean":
        flag = value.new_full((1,), float(item.is_seen), dtype=torch.float64)
        return [value.double() * flag, flag]
    flat = torch.cat(_halves(value)) if entry.is_whole else value.double()
    return [flat if entry.op == "sum" else _slots(flat, here)]


def _slots(flat: torch.Tensor, here: World) -> torch.Tensor:
    if here.size == 1:
        return flat
    slots = flat.new_zeros(here.size, flat.numel())
    slots[here.rank] = flat
    return slots.reshape(-1)


def _halves(value: torch.Tensor) -> list[torch.Tensor]:
    """A whole number as high and low 32 bits. Sums of either over 2^20 ranks stay below 2^53: float64 is exact."""
    value = value.long()
    return [(value >> 32).double(), (value & 0xFFFFFFFF).double()]


def _joined_halves(flat: torch.Tensor) -> torch.Tensor:
    high, low = flat.long().chunk(2, dim=-1)
    return (high << 32) + low


def _split(flat: torch.Tensor, lengths: list[int]) -> Sequence[torch.Tensor]:
    return flat.split(lengths)  # type: ignore[no-any-return,no-untyped-call]


def _unpacked(host: torch.Tensor, items: list[Item], layout: tuple[_Entry, ...], here: World) -> list[torch.Tensor]:
    pieces = _split(host, [entry.lanes(here.size) for entry in layout])
    extremes = _extremes(items, layout, here)
    joined = _concatenated(items, layout, pieces, here)
    values = []
    for index, (entry, piece) in enumerate(zip(layout, pieces, strict=True)):
        if entry.op == "cat":
            values.append(joined[index])
        elif entry.op in ("min", "max"):
            values.append(extremes[index])
        else:
            values.append(_unpacked_one(entry, piece, items[index], here))
    return values


def _unpacked_one(entry: _Entry, piece: torch.Tensor, item: Item, here: World) -> torch.Tensor:
    if entry.op == "mean":
        total, num_seen = piece[:-1], piece[-1]
        if num_seen == 0:
            return item.value.detach().cpu()
        return (total / num_seen).to(entry.dtype if not entry.is_whole else torch.float64).reshape(entry.shape)
    if entry.op == "gather":
        rows = piece.reshape(here.size, -1)
        value = _joined_halves(rows) if entry.is_whole else rows
        return value.to(entry.dtype).reshape(here.size, *entry.shape)
    value = _joined_halves(piece) if entry.is_whole else piece
    # A sum of booleans is a count; every other dtype comes back as it went in.
    return value.to(torch.int64 if entry.dtype == torch.bool else entry.dtype).reshape(entry.shape)


# -- minima and maxima -------------------------------------------------------------------------------------------


def _extremes(items: list[Item], layout: tuple[_Entry, ...], here: World) -> dict[int, torch.Tensor]:
    """Minima and maxima by the states' index, in one all-reduce: a minimum is the maximum of the reversed order."""
    wanted = [index for index, entry in enumerate(layout) if entry.op in ("min", "max")]
    if not wanted:
        return {}
    sent = torch.cat([_ordered(items[index], layout[index], here) for index in wanted])
    pieces = _split(max_tensor(sent, here).cpu(), [layout[index].numel for index in wanted])
    return {index: _from_ordered(layout[index], piece) for index, piece in zip(wanted, pieces, strict=True)}


def _ordered(item: Item, entry: _Entry, here: World) -> torch.Tensor:
    """int64 numbers that are ordered as the values are; NaN is above everything, whichever end is asked for."""
    value = item.value.detach().to(here.device).reshape(-1)
    if entry.is_whole:
        bits = value.long()
    else:
        bits = value.double().view(torch.int64)
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    if entry.op == "min":
        bits = ~bits
    if not entry.is_whole:
        bits = torch.where(value.isnan(), torch.iinfo(torch.int64).max, bits)
    return bits


def _from_ordered(entry: _Entry, bits: torch.Tensor) -> torch.Tensor:
    if entry.is_whole:
        return (~bits if entry.op == "min" else bits).to(entry.dtype).reshape(entry.shape)
    is_nan = bits == torch.iinfo(torch.int64).max
    bits = ~bits if entry.op == "min" else bits
    value = (bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)).view(torch.float64)
    return torch.where(is_nan, torch.nan, value).to(entry.dtype).reshape(entry.shape)


# -- joined states -----------------------------------------------------------------------------------------------


def _concatenated(
    items: list[Item], layout: tuple[_Entry, ...], pieces: Sequence[torch.Tensor], here: World
) -> dict[int, torch.Tensor]:
    """All "cat" states by index, in the order of ranks, in one padded gather of their bytes."""
    wanted = [index for index, entry in enumerate(layout) if entry.op == "cat"]
    if not wanted:
        return {}
    lengths = {index: [int(length) for length in pieces[index].tolist()] for index in wanted}
    widths = {index: layout[index].numel * layout[index].dtype.itemsize for index in wanted}
    mine = [items[index].value.detach().to(here.device, layout[index].dtype).contiguous() for index in wanted]
    sizes = [sum(lengths[index][rank] * widths[index] for index in wanted) for rank in range(here.size)]
    gathered = gather_bytes(torch.cat([value.reshape(-1).view(torch.uint8) for value in mine]), sizes, here)
    parts: dict[int, list[torch.Tensor]] = {index: [] for index in wanted}
    for rank, row in enumerate(gathered):
        cuts = [lengths[index][rank] * widths[index] for index in wanted]
        for index, piece in zip(wanted, _split(row, cuts), strict=True):
            # clone: the bytes of one state may begin where its dtype cannot be read in place.
            values = piece.clone().view(layout[index].dtype)
            parts[index].append(values.reshape(lengths[index][rank], *layout[index].shape))
    return {index: torch.cat(part) for index, part in parts.items()}
