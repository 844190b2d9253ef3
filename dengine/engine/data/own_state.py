"""Save the state that data keep between passes on their own: counters and random number generators.

Without this, data with neither a `set_epoch` nor a `state_dict` would start a resumed run as in their first pass. As an
epoch starts, generators are saved, and attributes that are whole numbers and have changed since the run started.
"""

import gc
from collections.abc import Collection, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from dengine.data.generators import attributes_of, generators_of
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
                "generators": {name: generator_state for name, (generator_state, _) in generators_of(part).items()},
            }
            for part, first in zip(self._parts, self._first, strict=True)
        ]

    def restore(self, saved: SavedOwnState, *, counts: bool, but: Collection[object] = ()) -> None:
        """Set generators and, with `counts`, whole numbers that still exist under the same name, except of parts in
        `but`.
        """
        for part, first, state in zip(self._parts, self._first, saved, strict=False):
            if any(part is each for each in but):
                continue
            for name, (_, set_state) in generators_of(part).items():
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
    return {name: value for name, value in attributes_of(part).items() if type(value) is int}
