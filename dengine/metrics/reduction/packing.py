"""The states of all metrics in one buffer, and back.

Floats lie in it as they are; whole numbers as two halves of 32 bits, whose sums float64 holds exactly, so that int64
counts stay exact; what must keep the ranks apart ("gather", lengths of "cat") in a row for each rank, zero in everybody
else's. Minima and maxima are sent as integers that are ordered as the numbers are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dengine.comm.collectives import gather_bytes, max_tensor
from dengine.launch.world import World
from dengine.metrics.reduction.schema import Entry, Item

__all__ = ["HEADER", "Plan", "packed", "unpacked"]

HEADER = 2  # lanes: ranks whose layout has changed, ranks that failed to give their states


@dataclass(frozen=True)
class Plan:
    """Which states lie where in the buffer: their indices, kind by kind, so that each kind is packed in one go.

    The buffer: header | floats | whole numbers, high halves | low halves | a row for each rank of the same three.
    """

    sums: tuple[int, ...]  # floats to be summed
    counts: tuple[int, ...]  # whole numbers to be summed
    means: tuple[int, ...]  # behind the floats: value and flag
    slots: tuple[int, ...]  # floats that keep the ranks apart
    whole_slots: tuple[int, ...]
    joined: tuple[int, ...]  # "cat": their lengths, behind the whole slots
    extremes: tuple[int, ...]

    @classmethod
    def of(cls, layout: tuple[Entry, ...]) -> "Plan":
        def those(*ops: str, is_whole: bool | None = None) -> tuple[int, ...]:
            return tuple(i for i, e in enumerate(layout) if e.op in ops and is_whole in (None, e.is_whole))

        return cls(
            sums=those("sum", is_whole=False),
            counts=those("sum", is_whole=True),
            means=those("mean"),
            slots=those("gather", is_whole=False),
            whole_slots=those("gather", is_whole=True),
            joined=those("cat"),
            extremes=those("min", "max"),
        )


def packed(
    items: list[Item] | None, layout: tuple[Entry, ...], plan: Plan, here: World, failure: str | None
) -> torch.Tensor:
    """The float64 buffer of this rank. One that has nothing to give says so in the header and sends zeros."""
    device = here.device
    if items is None or failure is not None:
        buffer = torch.zeros(HEADER + sum(_sections(layout, plan, here)), dtype=torch.float64)
        buffer[0], buffer[1] = float(items is None), float(failure is not None)
        return buffer.to(device)
    floats = [items[index].value for index in plan.sums] + _weighted_means(items, plan)
    counts = _flat([items[index].value for index in plan.counts], device, torch.int64)
    lengths = torch.tensor([items[index].value.shape[0] for index in plan.joined], dtype=torch.int64)
    own_floats = _flat([items[index].value for index in plan.slots], device, torch.float64)
    own_counts = _flat([*(items[index].value for index in plan.whole_slots), lengths], device, torch.int64)
    own = torch.cat([own_floats, *_halves(own_counts)])
    header = torch.zeros(HEADER, dtype=torch.float64, device=device)
    return torch.cat([header, _flat(floats, device, torch.float64), *_halves(counts), _in_its_row(own, here)])


def _flat(values: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if not values:
        return torch.empty(0, dtype=dtype, device=device)
    parts = [value.detach().reshape(-1) for value in values]
    if any(part.device != device for part in parts):
        parts = [part.to(device) for part in parts]
    return torch.cat(parts).to(dtype)


def _weighted_means(items: list[Item], plan: Plan) -> list[torch.Tensor]:
    """A rank that saw nothing adds nothing to the value, nor to the number of ranks."""
    parts: list[torch.Tensor] = []
    for index in plan.means:
        flag = torch.tensor([float(items[index].is_seen)], dtype=torch.float64)
        parts += [items[index].value.detach().double() * float(items[index].is_seen), flag]
    return parts


def _in_its_row(own: torch.Tensor, here: World) -> torch.Tensor:
    """Zeros in the other ranks' rows: summed, each rank has its own."""
    if here.size == 1:
        return own
    rows = own.new_zeros(here.size, own.numel())
    rows[here.rank] = own
    return rows.reshape(-1)


def _sections(layout: tuple[Entry, ...], plan: Plan, here: World) -> tuple[int, int, int, int]:
    """Lengths of what follows the header: floats, halves of whole numbers (two sections), the rows of the ranks."""
    floats = sum(layout[index].numel for index in plan.sums) + sum(layout[index].numel + 1 for index in plan.means)
    counts = sum(layout[index].numel for index in plan.counts)
    row = sum(layout[index].numel for index in plan.slots)
    row += 2 * (sum(layout[index].numel for index in plan.whole_slots) + len(plan.joined))
    return floats, counts, counts, here.size * row


def _halves(value: torch.Tensor) -> list[torch.Tensor]:
    """A whole number as high and low 32 bits. Sums of either over 2^20 ranks stay below 2^53: float64 is exact."""
    return [(value >> 32).double(), (value & 0xFFFFFFFF).double()]


def _joined_halves(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return (high.long() << 32) + low.long()


def _split(flat: torch.Tensor, lengths: list[int], dim: int = 0) -> Sequence[torch.Tensor]:
    return flat.split(lengths, dim)  # type: ignore[no-any-return,no-untyped-call]


def unpacked(
    host: torch.Tensor, items: list[Item], layout: tuple[Entry, ...], plan: Plan, here: World
) -> list[torch.Tensor]:
    """The reduced states, from the summed buffer. Collective where there are minima, maxima or "cat" states."""
    _, floats, high, low, rows = _split(host, [HEADER, *_sections(layout, plan, here)])
    values = dict(_extremes(items, layout, plan, here))
    num_floats = [layout[index].numel for index in plan.sums]
    *sums, means = _split(floats, [*num_floats, floats.numel() - sum(num_floats)])
    values |= {index: _shaped(part, layout[index]) for index, part in zip(plan.sums, sums, strict=True)}
    values |= _unpacked_means(means, items, layout, plan)
    counts = _split(_joined_halves(high, low), [layout[index].numel for index in plan.counts])
    values |= {index: _shaped(part, layout[index]) for index, part in zip(plan.counts, counts, strict=True)}
    if plan.slots or plan.whole_slots or plan.joined:
        values |= _unpacked_rows(rows.reshape(here.size, -1), items, layout, plan, here)
    return [values[index] for index in range(len(layout))]


def _shaped(part: torch.Tensor, entry: Entry) -> torch.Tensor:
    dtype = _dtype_of_sum(entry)
    return (part if part.dtype == dtype else part.to(dtype)).reshape(entry.shape)


def _dtype_of_sum(entry: Entry) -> torch.dtype:
    """As it went in, but for what the sum of all ranks may not fit into: a sum of booleans or bytes is a count."""
    if entry.is_whole:
        return torch.int64
    return torch.float32 if entry.dtype.itemsize < 4 else entry.dtype


def _unpacked_means(
    means: torch.Tensor, items: list[Item], layout: tuple[Entry, ...], plan: Plan
) -> dict[int, torch.Tensor]:
    values = {}
    for index in plan.means:
        entry = layout[index]
        total, num_seen, means = _split(means, [entry.numel, 1, means.numel() - entry.numel - 1])
        dtype = torch.float64 if entry.is_whole else entry.dtype
        default = items[index].value.detach().cpu()
        values[index] = default if num_seen == 0 else (total / num_seen).to(dtype).reshape(entry.shape)
    return values


def _unpacked_rows(
    rows: torch.Tensor, items: list[Item], layout: tuple[Entry, ...], plan: Plan, here: World
) -> dict[int, torch.Tensor]:
    """What keeps the ranks apart: (ranks, ...) for "gather", and the "cat" states, whose lengths are among it."""
    num_floats = [layout[index].numel for index in plan.slots]
    num_wholes = [layout[index].numel for index in plan.whole_slots] + [1] * len(plan.joined)
    floats, high, low = _split(rows, [sum(num_floats), sum(num_wholes), sum(num_wholes)], 1)
    pieces = [*_split(floats, num_floats, 1), *_split(_joined_halves(high, low), num_wholes, 1)]
    values = {}
    for index, piece in zip((*plan.slots, *plan.whole_slots), pieces, strict=False):
        values[index] = piece.to(layout[index].dtype).reshape(here.size, *layout[index].shape)
    lengths = pieces[len(pieces) - len(plan.joined) :]
    return values | _concatenated(items, layout, plan, lengths, here)


# -- minima and maxima -------------------------------------------------------------------------------------------


def _extremes(items: list[Item], layout: tuple[Entry, ...], plan: Plan, here: World) -> dict[int, torch.Tensor]:
    """Minima and maxima by the states' index, in one all-reduce: a minimum is the maximum of the reversed order."""
    wanted = plan.extremes
    if not wanted:
        return {}
    sent = torch.cat([_ordered(items[index], layout[index], here) for index in wanted])
    pieces = _split(max_tensor(sent, here).cpu(), [layout[index].numel for index in wanted])
    return {index: _from_ordered(layout[index], piece) for index, piece in zip(wanted, pieces, strict=True)}


def _ordered(item: Item, entry: Entry, here: World) -> torch.Tensor:
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


def _from_ordered(entry: Entry, bits: torch.Tensor) -> torch.Tensor:
    if entry.is_whole:
        return (~bits if entry.op == "min" else bits).to(entry.dtype).reshape(entry.shape)
    is_nan = bits == torch.iinfo(torch.int64).max
    bits = ~bits if entry.op == "min" else bits
    value = (bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)).view(torch.float64)
    return torch.where(is_nan, torch.nan, value).to(entry.dtype).reshape(entry.shape)


# -- joined states -----------------------------------------------------------------------------------------------


def _concatenated(
    items: list[Item], layout: tuple[Entry, ...], plan: Plan, lengths_R: Sequence[torch.Tensor], here: World
) -> dict[int, torch.Tensor]:
    """All "cat" states by index, in the order of ranks, in one padded gather of their bytes."""
    wanted = plan.joined
    if not wanted:
        return {}
    lengths = {index: piece.reshape(-1).tolist() for index, piece in zip(wanted, lengths_R, strict=True)}
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
