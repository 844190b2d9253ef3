"""What the ranks agree upon before they add up their metrics' states: which there are, and of which shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dengine.errors import MetricStateError
from dengine.metrics.core.metric import StateOp

__all__ = ["Entry", "Item", "entry_of", "fitted", "merged"]


@dataclass(frozen=True)
class Item:
    """One state on its way. Where this rank saw nothing, `value` is its default, and others tell dtype and shape."""

    metric: str  # as the user knows it: name and class
    state: str
    op: StateOp
    value: torch.Tensor
    is_seen: bool = True
    form: tuple[Any, ...] = ()  # what else of it must be the same on all ranks: what several values were laid into one

    def __post_init__(self) -> None:
        if self.op != "cat" and self.value.is_complex():
            raise MetricStateError(
                f"The state {self.state!r} of {self.metric} is complex, and only real numbers are reduced: keep real "
                "and imaginary part as two states (torch.view_as_real gives both as one)."
            )


@dataclass(frozen=True)
class Entry:
    """What is agreed about one state. `shape` leaves out the first dimension of a "cat" state."""

    metric: str
    state: str
    op: StateOp
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_seen: bool
    form: tuple[Any, ...] = ()

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


def entry_of(item: Item) -> Entry:
    value = item.value
    shape = tuple(value.shape[1:] if item.op == "cat" else value.shape)
    return Entry(item.metric, item.state, item.op, value.dtype, shape, item.is_seen and value.numel() > 0, item.form)


def merged(ranks: list[tuple[Entry, ...]]) -> tuple[Entry, ...]:
    """What all ranks can reduce by: from those that have seen data, as only they know shapes."""
    kinds = [[(entry.metric, entry.state, entry.op) for entry in entries] for entries in ranks]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise MetricStateError(_difference(rank, kind, kinds[0]))
    return tuple(_mergedentry_of(entries) for entries in zip(*ranks, strict=True))


def _mergedentry_of(entries: tuple[Entry, ...]) -> Entry:
    seen = [(rank, entry) for rank, entry in enumerate(entries) if entry.is_seen]
    if not seen:
        return entries[0]
    first_rank, first = seen[0]
    dtype = first.dtype
    for rank, entry in seen[1:]:
        if entry.form != first.form:
            raise MetricStateError(
                f"The ranks cannot add up {first.metric}: it computed {_told(entry)} on rank {rank}, but "
                f"{_told(first)} on rank {first_rank}. It must compute the same everywhere."
            )
        if entry.shape != first.shape:
            raise MetricStateError(
                f"The ranks cannot add up {first.metric}: its state {first.state!r} has shape {entry.shape} on rank "
                f"{rank}, but {first.shape} on rank {first_rank}. Give it the same size everywhere (num_classes=)."
            )
        dtype = torch.promote_types(dtype, entry.dtype)
    return replace(first, dtype=dtype)


def _told(entry: Entry) -> str:
    """`'a' of shape (), 'b' of shape (2,)`."""
    return ", ".join(f"{name or 'a value'!r} of shape {shape}" for name, shape, *_ in entry.form) or "a number"


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


def fitted(items: Sequence[Item], layout: tuple[Entry, ...]) -> list[Item] | None:
    """The items in the agreed shapes, defaults widened to them; None where this rank's own have changed."""
    if len(items) != len(layout):
        return None
    found = []
    for item, agreed in zip(items, layout, strict=True):
        if item.metric != agreed.metric or item.state != agreed.state or item.op != agreed.op:
            return None
        value = item.value
        shape = value.shape[1:] if item.op == "cat" else value.shape
        if item.is_seen and value.numel():
            is_narrower = value.dtype == agreed.dtype or torch.promote_types(value.dtype, agreed.dtype) == agreed.dtype
            if shape != agreed.shape or not is_narrower or item.form != agreed.form:
                return None
            found.append(item)
        elif item.op == "cat":
            found.append(replace(item, value=value.new_zeros((0, *agreed.shape))))
        else:
            found.append(item if shape == agreed.shape else replace(item, value=_widened(value, agreed)))
    return found


def _widened(default: torch.Tensor, agreed: Entry) -> torch.Tensor:
    """A default in a shape that another rank's data have told."""
    one = default.reshape(-1)[:1] if default.numel() else default.new_zeros(1)
    return one.expand(max(agreed.numel, 1))[: agreed.numel].reshape(agreed.shape)
