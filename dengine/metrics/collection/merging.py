"""Adapt metrics that combine states by their own `merge_state(others)`, as torcheval's do.

The states are sent as bytes among the "cat" states, so that they need no collective of their own.
"""

import io
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from dengine.metrics.collection.saved_state import load_state_dict, state_dict
from dengine.metrics.core.computed import Computed, Form
from dengine.metrics.core.kinds import is_metric
from dengine.metrics.reduction.reduce import State

__all__ = ["MergingAdapter"]


class MergingAdapter:
    """Adapts a metric with `merge_state`. A rank that saw nothing sends nothing, and is not merged."""

    def __init__(self, metric: object, label: str, *, is_seen: bool) -> None:
        self._metric = metric
        self._label = label
        self._is_seen = is_seen

    def states(self) -> list[State]:
        state = _packed(state_dict(self._metric)) if self._is_seen else torch.empty(0, dtype=torch.uint8)
        return [
            State(self._label, "length", "gather", torch.tensor(state.numel()), self._is_seen),
            State(self._label, "state", "cat", state, self._is_seen),
        ]

    def reduced(self, values: Sequence[torch.Tensor], forms: Sequence[Form]) -> Any:
        """A copy with the states of all ranks, merged in the order of ranks."""
        lengths, states = values
        parts = states.cpu().split(lengths.tolist())  # type: ignore[no-untyped-call]
        copies = [self._copy(_unpacked(part)) for part in parts if part.numel()]
        if not copies:
            return Computed(None)
        first, *others = copies
        if others:
            merged = first.merge_state(others)
            return first if merged is None else merged
        return first

    def own(self) -> Any:
        return self._metric if self._is_seen else Computed(None)

    def _copy(self, state: dict[str, Any]) -> Any:
        # Modules that a metric was built with (a network that gives features) are shared, as they may be large.
        attributes = getattr(self._metric, "__dict__", {}).values()
        shared = {
            id(value): value for value in attributes if isinstance(value, torch.nn.Module) and not is_metric(value)
        }
        copied = deepcopy(self._metric, shared)
        load_state_dict(copied, state)
        return copied


def _packed(state: dict[str, Any]) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _unpacked(part: torch.Tensor) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(part.numpy().tobytes()), weights_only=True)
    return state
