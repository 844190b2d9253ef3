"""Which states all ranks have alike, so that each node can save its own; the others are rank 0's."""

import copy
import hashlib
import io
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dengine.checkpoint.states.snapshot import RESERVED, States, unwrapped
from dengine.compiled_names import without_compiled
from dengine.types import Stateful

__all__ = ["Alike", "canonical", "digest"]


class Alike:
    """The parameters of models and the states of their optimizers: training makes them equal on all ranks.

    Buffers (batch norm's differ) and objects of other kinds are as rank 0 has them, as in every checkpoint.
    """

    def __init__(self, objects: Mapping[str, Stateful]) -> None:
        self._keys: dict[str, frozenset[str]] = {}
        for name, value in unwrapped(objects).items():
            if isinstance(value, nn.Module):
                parameters = value.named_parameters(remove_duplicate=False)
                self._keys[name] = frozenset(without_compiled(each) for each, _ in parameters)
            elif isinstance(value, torch.optim.Optimizer):
                self._keys[name] = frozenset(["state"])

    def others(self, states: States) -> dict[str, bytes]:
        """What is rank 0's in each of the `states`, as bytes."""
        return {name: self._others(name, state) for name, state in states.items() if name != RESERVED}

    def with_others(self, states: States, others: Mapping[str, bytes]) -> States:
        """`states` with the `others` of rank 0 in them."""
        new = dict(states)
        for name, content in others.items():
            theirs = torch.load(io.BytesIO(content), weights_only=True)["others"]
            keys = self._keys.get(name)
            if keys is None:
                new[name] = theirs
                continue
            merged = copy.copy(states[name])
            for key in [key for key in merged if key not in keys and key not in theirs]:
                del merged[key]
            merged.update(theirs)
            new[name] = merged
        return new

    def _others(self, name: str, state: Any) -> bytes:
        keys = self._keys.get(name)
        kept = state if keys is None else {key: value for key, value in state.items() if key not in keys}
        buffer = io.BytesIO()
        torch.save({"others": kept}, buffer)
        return buffer.getvalue()


def canonical(value: Any) -> Any:
    """`value` so that equal values give equal bytes: pickle notes which strings and containers are the same object."""
    if type(value) is str:
        return sys.intern(value)
    if isinstance(value, dict):
        new = copy.copy(value)
        new.clear()
        new.update((canonical(key), canonical(part)) for key, part in value.items())
        vars_of = getattr(new, "__dict__", {})  # the versions in a module's state
        attributes = {sys.intern(name): canonical(each) for name, each in vars_of.items()}
        vars_of.clear()  # else it would keep its keys
        vars_of.update(attributes)
        return new
    return type(value)(map(canonical, value)) if type(value) in (list, tuple) else value


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
