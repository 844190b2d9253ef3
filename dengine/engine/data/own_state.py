"""Save the state that data keep between passes on their own: counters and random number generators.

Without this, data with neither a `set_epoch` nor a `state_dict` would start a resumed run as in their first pass. As an
epoch starts, generators are saved, and attributes that are whole numbers and have changed since the run started.
"""

import gc
import json
import random
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from dengine.data.loader import inside
from dengine.data.parts import members_of, parts_of

__all__ = ["OwnState", "SavedOwnState", "holds_any", "is_restored_by_user"]

SavedOwnState: TypeAlias = list[dict[str, Any]]  # one for each part; numbers, strings and tensors

_SEARCH_DEPTH, _SEARCH_SIZE = 6, 10_000


class OwnState:
    """The plain state of `data`, observed during a run that starts now.

    An iterator has none: it is fast-forwarded from its beginning instead.
    """

    def __init__(self, data: object) -> None:
        is_one_shot = isinstance(data, Iterator) and not members_of(data)
        self._parts = [] if is_one_shot else [inside(part) for part in parts_of(data)]
        self._first = [_whole_numbers(part) for part in self._parts]

    def capture(self) -> SavedOwnState:
        """The state as of now. Cost: a look at the attributes of at most five objects; 5 kB for each generator."""
        return [
            {
                "counts": {
                    name: value for name, value in _whole_numbers(part).items() if first.get(name, value) != value
                },
                "generators": {name: generator_state for name, (generator_state, _) in _generators(part).items()},
            }
            for part, first in zip(self._parts, self._first, strict=True)
        ]

    def restore(self, saved: SavedOwnState, *, counts: bool) -> None:
        """Set generators and, with `counts`, whole numbers that still exist under the same name."""
        for part, first, state in zip(self._parts, self._first, saved, strict=False):
            for name, (_, set_state) in _generators(part).items():
                if name in state["generators"]:
                    set_state(state["generators"][name])
            for name, value in state["counts"].items() if counts else ():
                if name in first:
                    setattr(part, name, value)


def holds_any(data: object, objects: Iterable[object]) -> bool:
    """Whether `data` is one of `objects`, or iterates over one: inside a wrapper, a generator, a `zip`."""
    wanted = {id(each) for each in objects}
    seen: set[int] = set()
    level = [data]
    for _ in range(_SEARCH_DEPTH):
        if any(id(each) in wanted for each in level):
            return True
        seen.update(map(id, level))
        found = gc.get_referents(*level)
        level = list({id(each): each for each in found if id(each) not in seen and not _is_leaf(each)}.values())
        if not level or len(seen) > _SEARCH_SIZE:
            return False
    return False


def is_restored_by_user(data: object) -> bool:
    """Whether the user has loaded a state into `data` (torchdata's loader), so that the next pass goes on from
    there.
    """
    return any(getattr(part, "next_iter_state", None) is not None for part in parts_of(data))


def _is_leaf(value: object) -> bool:
    # Objects that refer to everything, or that keep no position.
    return isinstance(
        value, (ModuleType, type, FunctionType, BuiltinFunctionType, str, bytes, int, float, torch.Tensor, nn.Module)
    )


def _whole_numbers(part: object) -> dict[str, int]:
    return {name: value for name, value in _attributes(part).items() if type(value) is int}


def _generators(part: object) -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """The generators of `part` by name: the state of each, and the function that sets it."""
    found: dict[str, tuple[Any, Callable[[Any], None]]] = {}
    for name, value in _attributes(part).items():
        if isinstance(value, torch.Generator):
            found[name] = value.get_state(), _setter_of_torch(value)
        elif type(value) is random.Random:
            found[name] = json.dumps(value.getstate()), _setter_of_python(value)
        elif isinstance(value, (np.random.Generator, np.random.RandomState)):
            bits: Any = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator
            found[name] = json.dumps(bits.state, default=np.ndarray.tolist), _setter_of_numpy(bits)
    return found


def _setter_of_torch(generator: torch.Generator) -> Callable[[torch.Tensor], None]:
    def set_state(state: torch.Tensor) -> None:
        generator.set_state(state)

    return set_state


def _setter_of_python(generator: random.Random) -> Callable[[str], None]:
    def set_state(state: str) -> None:
        version, numbers, gauss = json.loads(state)
        generator.setstate((version, tuple(numbers), gauss))

    return set_state


def _setter_of_numpy(bits: Any) -> Callable[[str], None]:
    def set_state(state: str) -> None:
        bits.state = json.loads(state)

    return set_state


def _attributes(part: object) -> dict[str, Any]:
    attributes = getattr(part, "__dict__", {})
    return attributes if isinstance(attributes, dict) else {}
