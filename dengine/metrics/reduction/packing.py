"""Pack the states of all metrics into one buffer, and unpack it.

Floats are in it as they are. Whole numbers are in it as two halves of 32 bits, whose sums are exact in float64. States
that keep the ranks apart ("gather", lengths of "cat") have a row for each rank, and a rank sends zeros in the other
rows. Minima and maxima are sent as integers with the same order as the numbers.

On a mesh only the ranks that count samples (`World.counts_samples`) have a row and send something; the others send
zeros, and get the same sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from dengine.comm.collectives import gather_bytes, max_tensor
from dengine.launch.world import World
from dengine.metrics.reduction.schema import Schema, State

__all__ = ["HEADER", "Plan", "of_one_rank", "packed", "unpacked"]

HEADER = 2  # two flags: ranks whose schemas have changed, ranks that could not give their states


@dataclass(frozen=True)
class Plan:
    """The layout of the buffer: the indices of the states of each kind, so that each kind is packed in one step.

    The buffer: header | floats | whole numbers, high halves | low halves | a row for each rank of the same three.
    """

    sums: tuple[int, ...]  # floats to be summed
    counts: tuple[int, ...]  # whole numbers to be summed
    means: tuple[int, ...]  # after the floats: value and flag
    per_rank_floats: tuple[int, ...]  # floats that keep the ranks apart
    per_rank_counts: tuple[int, ...]
    cats: tuple[int, ...]  # "cat": their lengths, after `per_rank_counts`
    extremes: tuple[int, ...]
    numels: tuple[int, ...]  # of every state, one after the other

    @classmethod
    def of(cls, schemas: tuple[Schema, ...]) -> "Plan":
        whole = [_is_whole(schema) for schema in schemas]

        def those(*ops: str, is_whole: bool | None = None) -> tuple[int, ...]:
            return tuple(i for i, e in enumerate(schemas) if e.op in ops and is_whole in (None, whole[i]))

        return cls(
            sums=those("sum", is_whole=False),
            counts=those("sum", is_whole=True),
            means=those("mean"),
            per_rank_floats=those("gather", "samples", is_whole=False),
            per_rank_counts=those("gather", "samples", is_whole=True),
            cats=those("cat"),
            extremes=those("min", "max"),
            numels=tuple(prod(schema.shape) for schema in schemas),
        )


def _is_whole(schema: Schema) -> bool:
    return not (schema.dtype.is_floating_point or schema.dtype.is_complex)


def packed(
    states: list[State] | None, schemas: tuple[Schema, ...], plan: Plan, here: World, failure: str | None
) -> torch.Tensor:
    """The float64 buffer of this rank. It is zero if the rank does not count, or could not give its states."""
    device = here.device
    if states is None or failure is not None or not here.counts_samples:
        buffer = torch.zeros(HEADER + sum(_sections(schemas, plan, here)), dtype=torch.float64)
        buffer[0], buffer[1] = float(states is None), float(failure is not None)
        return buffer.to(device)
    floats = [states[index].value for index in plan.sums] + _weighted_means(states, plan)
    counts = _flat([states[index].value for index in plan.counts], device, torch.int64)
    lengths = torch.tensor([states[index].value.shape[0] for index in plan.cats], dtype=torch.int64)
    own_floats = _flat([states[index].value for index in plan.per_rank_floats], device, torch.float64)
    own_counts = _flat([*(states[index].value for index in plan.per_rank_counts), lengths], device, torch.int64)
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


def _weighted_means(states: list[State], plan: Plan) -> list[torch.Tensor]:
    """The value and a flag for each "mean" state: both are 0 on a rank that saw nothing."""
    parts: list[torch.Tensor] = []
    for index in plan.means:
        flag = torch.tensor([float(states[index].is_seen)], dtype=torch.float64)
        parts += [states[index].value.detach().double() * float(states[index].is_seen), flag]
    return parts


def _in_its_row(own: torch.Tensor, here: World) -> torch.Tensor:
    """`own` in this rank's row and zeros in the others, so that the sum has every rank's row."""
    ranks = here.all_counting_ranks
    rows = own.new_zeros(len(ranks), own.numel())
    rows[ranks.index(here.rank)] = own
    return rows.reshape(-1)


def _sections(schemas: tuple[Schema, ...], plan: Plan, here: World) -> tuple[int, int, int, int]:
    """The lengths of the sections after the header: floats, two for halves of whole numbers, the rows of the ranks."""
    floats = sum(plan.numels[index] for index in plan.sums) + sum(plan.numels[index] + 1 for index in plan.means)
    counts = sum(plan.numels[index] for index in plan.counts)
    row = sum(plan.numels[index] for index in plan.per_rank_floats)
    row += 2 * (sum(plan.numels[index] for index in plan.per_rank_counts) + len(plan.cats))
    return floats, counts, counts, len(here.all_counting_ranks) * row


def _halves(value: torch.Tensor) -> list[torch.Tensor]:
    """Whole numbers as high and low 32 bits. Sums of these over 2^20 ranks stay below 2^53, so float64 is exact."""
    return [(value >> 32).double(), (value & 0xFFFFFFFF).double()]


def _whole_from_halves(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return (high.long() << 32) + low.long()


def _split(flat: torch.Tensor, lengths: list[int], dim: int = 0) -> Sequence[torch.Tensor]:
    return flat.split(lengths, dim)  # type: ignore[no-any-return,no-untyped-call]


def unpacked(
    host: torch.Tensor, states: list[State], schemas: tuple[Schema, ...], plan: Plan, here: World
) -> list[torch.Tensor]:
    """The reduced states, from the summed buffer. Collective if there are minima, maxima or "cat" states."""
    _, floats, high, low, rows = _split(host, [HEADER, *_sections(schemas, plan, here)])
    values = dict(_extremes(states, schemas, plan, here))
    num_floats = [plan.numels[index] for index in plan.sums]
    *sums, means = _split(floats, [*num_floats, floats.numel() - sum(num_floats)])
    values |= {index: _shaped(part, schemas[index]) for index, part in zip(plan.sums, sums, strict=True)}
    values |= _unpacked_means(means, states, schemas, plan)
    counts = _split(_whole_from_halves(high, low), [plan.numels[index] for index in plan.counts])
    values |= {index: _shaped(part, schemas[index]) for index, part in zip(plan.counts, counts, strict=True)}
    if plan.per_rank_floats or plan.per_rank_counts or plan.cats:
        values |= _unpacked_rows(rows.reshape(len(here.all_counting_ranks), -1), states, schemas, plan, here)
    return [values[index] for index in range(len(schemas))]


def _shaped(part: torch.Tensor, schema: Schema) -> torch.Tensor:
    dtype = _dtype_of_sum(schema)
    return (part if part.dtype == dtype else part.to(dtype)).reshape(schema.shape)


def _dtype_of_sum(schema: Schema) -> torch.dtype:
    """The dtype of the state, or int64 if the sum of all ranks may not fit: a sum of booleans or bytes is a count."""
    if _is_whole(schema):
        return torch.int64
    return torch.float32 if schema.dtype.itemsize < 4 else schema.dtype


def _unpacked_means(
    means: torch.Tensor, states: list[State], schemas: tuple[Schema, ...], plan: Plan
) -> dict[int, torch.Tensor]:
    values = {}
    for index in plan.means:
        schema = schemas[index]
        total, num_seen, means = _split(means, [schema.numel, 1, means.numel() - schema.numel - 1])
        dtype = torch.float64 if _is_whole(schema) else schema.dtype
        default = states[index].value.detach().cpu()
        values[index] = default if num_seen == 0 else (total / num_seen).to(dtype).reshape(schema.shape)
    return values


def _unpacked_rows(
    rows: torch.Tensor, states: list[State], schemas: tuple[Schema, ...], plan: Plan, here: World
) -> dict[int, torch.Tensor]:
    """The states that keep the ranks apart: (ranks, ...) for "gather", and the "cat" states."""
    num_floats = [plan.numels[index] for index in plan.per_rank_floats]
    num_wholes = [plan.numels[index] for index in plan.per_rank_counts] + [1] * len(plan.cats)
    floats, high, low = _split(rows, [sum(num_floats), sum(num_wholes), sum(num_wholes)], 1)
    pieces = [*_split(floats, num_floats, 1), *_split(_whole_from_halves(high, low), num_wholes, 1)]
    values = {}
    for index, piece in zip((*plan.per_rank_floats, *plan.per_rank_counts), pieces, strict=False):
        ranks = piece.to(schemas[index].dtype).reshape(len(rows), *schemas[index].shape)
        values[index] = _once_a_sample(ranks, here) if schemas[index].op == "samples" else ranks
    lengths = pieces[len(pieces) - len(plan.cats) :]
    return values | _concatenated(states, schemas, plan, lengths, here)


def _once_a_sample(counts_R: torch.Tensor, here: World) -> torch.Tensor:
    """The sum of counts of samples, in which ranks that share their samples count once."""
    row = {rank: index for index, rank in enumerate(here.all_counting_ranks)}
    return torch.stack([counts_R[[row[rank] for rank in ranks]].amax(0) for ranks in here.counting_ranks]).sum(0)


def of_one_rank(states: list[State], schemas: tuple[Schema, ...], here: World) -> list[torch.Tensor]:
    """The result of `packed` and `unpacked` for a single rank, without a buffer: copies of its own states.

    Cost: a copy of each state; one wait for each state on a GPU.
    """
    return [_own(state, schema, here) for state, schema in zip(states, schemas, strict=True)]


def _own(state: State, schema: Schema, here: World) -> torch.Tensor:
    value = state.value.detach()
    if schema.op == "cat":
        return value.to(here.device, schema.dtype, copy=True)
    dtype = schema.dtype
    if schema.op == "sum":
        dtype = _dtype_of_sum(schema)
    elif schema.op == "mean" and _is_whole(schema) and state.is_seen:
        dtype = torch.float64
    own = value.to("cpu", dtype, copy=True)
    if schema.op == "gather":
        return own.unsqueeze(0)
    return own.unsqueeze(0).sum(0) if schema.op == "samples" else own


# -- minima and maxima -------------------------------------------------------------------------------------------


def _extremes(states: list[State], schemas: tuple[Schema, ...], plan: Plan, here: World) -> dict[int, torch.Tensor]:
    """Minima and maxima by the states' index, in one all-reduce: a minimum is the maximum of the reversed order."""
    wanted = plan.extremes
    if not wanted:
        return {}
    sent = torch.cat([_ordered(states[index], schemas[index], here) for index in wanted])
    pieces = _split(max_tensor(sent, here).cpu(), [plan.numels[index] for index in wanted])
    return {index: _from_ordered(schemas[index], piece) for index, piece in zip(wanted, pieces, strict=True)}


def _ordered(state: State, schema: Schema, here: World) -> torch.Tensor:
    """The values as int64 numbers with the same order; NaN wins, for a minimum and for a maximum."""
    value = state.value.detach().to(here.device).reshape(-1)
    if not here.counts_samples:
        return torch.full_like(value, torch.iinfo(torch.int64).min, dtype=torch.int64)
    if _is_whole(schema):
        bits = value.long()
    else:
        bits = value.double().view(torch.int64)
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    if schema.op == "min":
        bits = ~bits
    if not _is_whole(schema):
        bits = torch.where(value.isnan(), torch.iinfo(torch.int64).max, bits)
    return bits


def _from_ordered(schema: Schema, bits: torch.Tensor) -> torch.Tensor:
    if _is_whole(schema):
        return (~bits if schema.op == "min" else bits).to(schema.dtype).reshape(schema.shape)
    is_nan = bits == torch.iinfo(torch.int64).max
    bits = ~bits if schema.op == "min" else bits
    value = (bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)).view(torch.float64)
    return torch.where(is_nan, torch.nan, value).to(schema.dtype).reshape(schema.shape)


# -- joined states -----------------------------------------------------------------------------------------------


def _concatenated(
    states: list[State], schemas: tuple[Schema, ...], plan: Plan, lengths_R: Sequence[torch.Tensor], here: World
) -> dict[int, torch.Tensor]:
    """All "cat" states by index, in the order of ranks, in one padded gather of their bytes."""
    wanted = plan.cats
    if not wanted:
        return {}
    lengths = {index: piece.reshape(-1).tolist() for index, piece in zip(wanted, lengths_R, strict=True)}
    widths = {index: plan.numels[index] * schemas[index].dtype.itemsize for index in wanted}
    mine = [states[index].value.detach().to(here.device, schemas[index].dtype).contiguous() for index in wanted]
    ranks = here.all_counting_ranks
    sizes = [0] * here.size
    for row, rank in enumerate(ranks):
        sizes[rank] = sum(lengths[index][row] * widths[index] for index in wanted)
    gathered = gather_bytes(torch.cat([value.reshape(-1).view(torch.uint8) for value in mine]), sizes, here)
    parts: dict[int, list[torch.Tensor]] = {index: [] for index in wanted}
    for row, rank in enumerate(ranks):
        cuts = [lengths[index][row] * widths[index] for index in wanted]
        for index, piece in zip(wanted, _split(gathered[rank], cuts), strict=True):
            # clone: the bytes of one state may begin at an address at which its dtype cannot be read.
            values = piece.clone().view(schemas[index].dtype)
            parts[index].append(values.reshape(lengths[index][row], *schemas[index].shape))
    return {index: torch.cat(part) for index, part in parts.items()}
