"""The schemas of states on which the ranks agree before they add up their metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dengine.errors import MetricStateError
from dengine.metrics.core.computed import Form
from dengine.metrics.core.metric import StateOp

__all__ = ["Schema", "State", "fitted", "merged", "schema_of", "schemas_of"]


@dataclass(frozen=True)
class State:
    """One state to be reduced. If this rank saw nothing, `value` is its default, and other ranks give dtype and
    shape.
    """

    metric: str  # the name and class that messages show
    name: str
    op: StateOp
    value: torch.Tensor
    is_seen: bool = True
    form: Form = ()  # must be the same on all ranks, too: the names and shapes of several values in one state

    def __post_init__(self) -> None:
        if self.op != "cat" and self.value.is_complex():
            raise MetricStateError(
                f"The state {self.name!r} of {self.metric} is complex, and only real numbers are reduced: keep real "
                "and imaginary part as two states (torch.view_as_real gives both as one)."
            )


@dataclass(frozen=True)
class Schema:
    """The agreed properties of one state. `shape` leaves out the first dimension of a "cat" state."""

    metric: str
    name: str
    op: StateOp
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_seen: bool
    form: Form = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_open(self) -> bool:
        """Whether the shape is not known yet."""
        return not self.is_seen and (self.op == "cat" or self.numel == 0)


def schema_of(state: State) -> Schema:
    value = state.value
    shape = tuple(value.shape[1:] if state.op == "cat" else value.shape)
    return Schema(
        state.metric, state.name, state.op, value.dtype, shape, state.is_seen and value.numel() > 0, state.form
    )


def schemas_of(states: Sequence[State]) -> tuple[Schema, ...]:
    return tuple(schema_of(state) for state in states)


def merged(ranks: list[tuple[Schema, ...]]) -> tuple[Schema, ...]:
    """The schemas for all ranks, from those that have seen data, as only they know shapes.

    Cost: time for each different object of `ranks`.
    """
    firsts = {id(schemas): rank for rank, schemas in reversed([*enumerate(ranks)])}
    distinct = {rank: ranks[rank] for rank in sorted(firsts.values())}
    kinds = {rank: [(each.metric, each.name, each.op) for each in schemas] for rank, schemas in distinct.items()}
    for rank, kind in kinds.items():
        if kind != kinds[0]:
            raise MetricStateError(_difference(rank, kind, kinds[0]))
    return tuple(
        _merged_schema(dict(zip(distinct, schemas, strict=True))) for schemas in zip(*distinct.values(), strict=True)
    )


def _merged_schema(schemas: dict[int, Schema]) -> Schema:
    seen = [(rank, schema) for rank, schema in schemas.items() if schema.is_seen]
    if not seen:
        return schemas[0]
    first_rank, first = seen[0]
    dtype = first.dtype
    for rank, schema in seen[1:]:
        if schema.form != first.form:
            raise MetricStateError(
                f"The ranks cannot add up {first.metric}: it computed {_described(schema)} on rank {rank}, but "
                f"{_described(first)} on rank {first_rank}. It must compute the same everywhere."
            )
        if schema.shape != first.shape:
            raise MetricStateError(
                f"The ranks cannot add up {first.metric}: its state {first.name!r} has shape {schema.shape} on rank "
                f"{rank}, but {first.shape} on rank {first_rank}. Give it the same size everywhere (num_classes=)."
            )
        dtype = torch.promote_types(dtype, schema.dtype)
    return replace(first, dtype=dtype)


def _described(schema: Schema) -> str:
    """The values of a schema as text: `'a' of shape (), 'b' of shape (2,)`."""
    return ", ".join(f"{name or 'a value'!r} of shape {shape}" for name, shape, *_ in schema.form) or "a number"


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


def fitted(states: Sequence[State], schemas: tuple[Schema, ...]) -> list[State] | None:
    """The states in the agreed shapes, with defaults expanded to them; None if this rank's schemas have changed."""
    if len(states) != len(schemas):
        return None
    found = []
    for state, agreed in zip(states, schemas, strict=True):
        if state.metric != agreed.metric or state.name != agreed.name or state.op != agreed.op:
            return None
        value = state.value
        shape = value.shape[1:] if state.op == "cat" else value.shape
        if state.is_seen and value.numel():
            is_narrower = value.dtype == agreed.dtype or torch.promote_types(value.dtype, agreed.dtype) == agreed.dtype
            if shape != agreed.shape or not is_narrower or state.form != agreed.form:
                return None
            found.append(state)
        elif state.op == "cat":
            found.append(replace(state, value=value.new_zeros((0, *agreed.shape))))
        else:
            found.append(state if shape == agreed.shape else replace(state, value=_widened(value, agreed)))
    return found


def _widened(default: torch.Tensor, agreed: Schema) -> torch.Tensor:
    """The default, expanded to a shape that another rank's data have given."""
    one = default.reshape(-1)[:1] if default.numel() else default.new_zeros(1)
    return one.expand(max(agreed.numel, 1))[: agreed.numel].reshape(agreed.shape)
