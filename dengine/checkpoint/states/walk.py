"""Walk over a state, and change or refuse the values in it.

Each container is visited once, however often it is referred to, so the walk also ends for a state that contains itself.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dengine.compiled_names import HIDDEN

__all__ = ["CERTAIN", "MOST_VALUES", "Refused", "Walk"]

# Types that a checkpoint can certainly load, which are given as they are.
CERTAIN = frozenset(
    {bool, int, float, complex, str, bytes, bytearray, type(None), torch.Size, torch.dtype, torch.device, torch.layout}
)
MOST_VALUES = 20_000_000
_DEEPEST = 200  # containers within containers: pickle and deepcopy end a little below Python's limit


class Refused(Exception):
    """A value is refused. `path` is made while the error is raised, so that it costs nothing without an error."""

    def __init__(self, reason: str, hint: str = "", *, is_pickle: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.hint, self.is_pickle = reason, hint, is_pickle
        self.path: list[Any] = []

    def text(self, name: str) -> str:
        place = "/".join(map(str, (name, *reversed(self.path))))
        if not self.is_pickle:
            return f"the state of {name!r} cannot be saved: {place!r} {self.reason}"
        return (
            f"the state of {name!r} holds something that only a pickle could bring back, which is never executed: "
            f"{place!r} {self.reason}. Make it of tensors, numbers, strings, lists and dicts{self.hint}."
        )


class Walk:
    """Gives a value with `leaf` applied to everything that is no container, and `rename` to the names in dicts.

    A part that does not change is given as it is.
    """

    def __init__(
        self, tensor: Callable[[torch.Tensor], Any], leaf: Callable[[Any], Any], rename: Callable[[str], str]
    ) -> None:
        self._tensor, self._leaf, self._rename = tensor, leaf, rename
        # id -> the container (kept, so that its id stays its own), its result, and its number of values
        self._done: dict[int, tuple[Any, Any, int]] = {}
        self._above: set[int] = set()
        self._num_values = 0

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in CERTAIN:
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if kind is dict or kind is OrderedDict or kind is Counter:
            return self._once(value, self._dict)
        if kind is list or kind is tuple:
            return self._once(value, self._sequence)
        if kind is set or kind is frozenset:
            return self._once(value, self._set)
        if isinstance(value, Mapping):
            return self._once(value, lambda value: self._dict(dict(value)))
        return self._leaf(value)

    def _once(self, value: Any, inside: Callable[[Any], Any]) -> Any:
        key = id(value)
        done = self._done.get(key)
        if done is None:
            if key in self._above:
                raise Refused("contains itself, so that it would have no end.")
            if len(self._above) >= _DEEPEST:
                raise Refused(f"lies deeper than {_DEEPEST} containers within each other.")
            self._above.add(key)
            before = self._num_values
            result = inside(value)
            self._above.discard(key)
            done = self._done[key] = value, result, self._num_values - before
        else:
            self._num_values += done[2]
        if self._num_values > MOST_VALUES:
            raise Refused(f"has more than {MOST_VALUES} values.")
        return done[1]

    def _sequence(self, value: Any) -> Any:
        parts: list[Any] = []
        self._num_values += len(value)
        try:
            for part in value:
                parts.append(self.of(part))
        except Refused as refused:
            refused.path.append(len(parts))
            raise
        is_same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if is_same else type(value)(parts)

    def _set(self, value: Any) -> Any:
        self._num_values += len(value)
        parts = {self.of(part) for part in value}
        is_same = type(value) is set and all(any(new is old for old in value) for new in parts)
        return value if is_same else parts

    def _dict(self, value: Any) -> Any:
        key: Any = None
        parts: dict[Any, Any] = {}
        is_same = True
        self._num_values += len(value)
        try:
            for key, part in value.items():
                new_key = key if type(key) is str and HIDDEN not in key else self._key(key)
                new = parts[new_key] = self.of(part)
                is_same = is_same and new is part and new_key is key
        except Refused as refused:
            refused.path.append(key)
            raise
        more = getattr(value, "__dict__", None)  # of a module's state, the versions
        new_more = {name: self._more(name, part) for name, part in more.items()} if more else {}
        more = more or {}
        if is_same and all(new_more[name] is more[name] for name in new_more):
            return value
        if len(parts) != len(value):  # two names that differ only in it keep it
            parts = {key: self.of(part) for key, part in value.items()}
        changed = type(value)()
        changed.update(parts)
        if new_more:
            changed.__dict__.update(new_more)
        return changed

    def _key(self, key: Any) -> Any:
        if type(key) is str:
            return self._rename(key)
        if isinstance(key, torch.Tensor):
            raise Refused("is the key of a dict, and a tensor.")
        return self.of(key)

    def _more(self, name: str, part: Any) -> Any:
        if name != "_metadata" or not isinstance(part, dict):
            return self.of(part)
        renamed = type(part)()
        for key, versions in part.items():  # what is inside comes after its wrapper, and wins
            renamed[self._rename(f"{key}.").removesuffix(".") if isinstance(key, str) else key] = self.of(versions)
        return part if list(renamed) == list(part) else renamed
