"""What a state may hold, so that `torch.load(weights_only=True)` brings it back; and what a loaded one may.

Both are told by one walk, before a byte is written or anything is given to an object. It follows each container once,
however often it is referred to, and so ends for a state that contains itself.
"""

import io
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from dengine.compiled_names import HIDDEN, without_compiled
from dengine.dtensor import is_made_of_others

__all__ = ["Plain", "check_loaded", "plain", "refuse_pickles"]

_CERTAIN = frozenset(
    {bool, int, float, complex, str, bytes, bytearray, type(None), torch.Size, torch.dtype, torch.device, torch.layout}
)
_TENSORS = (torch.Tensor, nn.Parameter)
# What a subclass of one of these (an Enum with str, say) equals, and is stored as.
_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, lambda value: bytes(bytearray(value))),
)
_WRAPPER = HIDDEN.removesuffix(".")  # as the whole name of a module has it, too
_DEEPEST_PLAIN = 8  # those of models and optimizers are less deep
_DEEPEST = 200  # containers within containers: pickle and deepcopy end a little below Python's limit
_MOST_VALUES = 20_000_000
# A tensor that declares more than it holds (an expanded one) may be that large.
_MOST_EXPANDED = 1 << 31


@dataclass(frozen=True)
class Plain:
    """A state, and the tensors in it. It is the given one where nothing had to be changed."""

    state: Any
    tensors: list[torch.Tensor] = field(default_factory=list)


def plain(name: str, state: Any) -> Plain:
    """`state`, which `name` gave, as plain data where it equals that: a member of a `str` enum or a scalar of NumPy's
    becomes a string or a number, a `frozenset` a set, another mapping a dict; and names lose what `torch.compile` has
    put into them.

    Cost: one visit of each value; a second one where it is not of the commonest kinds alone.

    Raises:
        TypeError: a state that contains itself, or a tensor without data; it names the path within the state.
    """
    tensors: list[torch.Tensor] = []
    if _is_plain(state, tensors, [_MOST_VALUES], _DEEPEST_PLAIN):
        return Plain(state, tensors)
    tensors.clear()

    def tensor(value: torch.Tensor) -> torch.Tensor:
        tensors.append(value)
        return _with_data(value)

    try:
        return Plain(_Walk(tensor, _as_base, without_compiled).of(state), tensors)
    except _Refused as refused:
        raise TypeError(refused.text(name)) from None


def _is_plain(value: Any, tensors: list[torch.Tensor], budget: list[int], depth: int) -> bool:
    """Whether `value` is made of dicts and lists, at most `depth` within each other, of no more values than the
    `budget` has left, for which there is nothing to do; its tensors are put into `tensors`.

    This is what a save costs for each tensor of a model and its optimizer, so it calls nothing for a tensor.
    """
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        for key in value:
            if type(key) is not int and (type(key) is not str or _WRAPPER in key):
                return False
        parts: Iterable[Any] = value.values()
        if kind is OrderedDict and vars(value):  # of a module's state, the versions
            parts = (*parts, vars(value))
    elif kind is list or kind is tuple:
        parts = value
    else:
        return False
    budget[0] -= len(value)
    if budget[0] < 0 or not depth:
        return False
    for part in parts:
        kind = type(part)
        if kind is torch.Tensor or kind is nn.Parameter:
            if part.is_meta:
                return False
            tensors.append(part)
        elif kind not in _CERTAIN and not _is_plain(part, tensors, budget, depth - 1):
            return False
    return True


def refuse_pickles(name: str, state: Any) -> None:
    """Refuse what `torch.load(weights_only=True)` would refuse: a checkpoint that nobody can load is none.

    Cost: a trial of each value of a class that is not known, of tensors one for each class.

    Raises:
        TypeError: names the path within the state.
    """
    tried: set[Any] = set()

    def tensor(value: torch.Tensor) -> torch.Tensor:
        if type(value) not in _TENSORS and (kinds := _kinds(value)) not in tried:
            hint = ", or import the library that has the class, which may have told torch that it is safe"
            _try(value, f"{hint} (torch.serialization.add_safe_globals)")
            tried.add(kinds)
        return value

    try:
        _Walk(tensor, lambda value: _try(value, _hint(value)), lambda key: key).of(state)
    except _Refused as refused:
        raise TypeError(refused.text(name)) from None


def check_loaded(states: Any) -> None:
    """Hold what was read against what can be used: a dict of states, finite, of tensors that have their data.

    Cost: one visit of each value.

    Raises:
        ValueError: names the path of what is wrong.
    """
    if not isinstance(states, dict) or not all(isinstance(name, str) for name in states):
        raise ValueError(f"it holds a {type(states).__qualname__} in the place of a dict of states by name")
    try:
        _Walk(_check_held, lambda value: value, lambda name: name).of(states)
    except _Refused as refused:
        raise ValueError(f"{'/'.join(map(str, reversed(refused.path)))!r} {refused.reason}") from None


class _Refused(Exception):
    """`path` is put together on the way up, so that nobody pays for it while nothing is wrong."""

    def __init__(self, reason: str, hint: str = "", *, is_pickle: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.hint, self.is_pickle = reason, hint, is_pickle
        self.path: list[Any] = []

    def text(self, name: str) -> str:
        where = "/".join(map(str, (name, *reversed(self.path))))
        if not self.is_pickle:
            return f"the state of {name!r} cannot be saved: {where!r} {self.reason}"
        return (
            f"the state of {name!r} holds something that only a pickle could bring back, which is never executed: "
            f"{where!r} {self.reason}. Make it of tensors, numbers, strings, lists and dicts{self.hint}."
        )


class _Walk:
    """Gives a value with `leaf` applied to what is no container, and `rename` to the names in dicts. What does not
    change is given as it is."""

    def __init__(
        self, tensor: Callable[[torch.Tensor], Any], leaf: Callable[[Any], Any], rename: Callable[[str], str]
    ) -> None:
        self._tensor, self._leaf, self._rename = tensor, leaf, rename
        # id -> the container (kept, so that its id stays its own), what became of it, and how many values it has
        self._done: dict[int, tuple[Any, Any, int]] = {}
        self._above: set[int] = set()
        self._num_values = 0

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _CERTAIN:
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
                raise _Refused("contains itself, so that it would have no end.")
            if len(self._above) >= _DEEPEST:
                raise _Refused(f"lies deeper than {_DEEPEST} containers within each other.")
            self._above.add(key)
            before = self._num_values
            result = inside(value)
            self._above.discard(key)
            done = self._done[key] = value, result, self._num_values - before
        else:
            self._num_values += done[2]
        if self._num_values > _MOST_VALUES:
            raise _Refused(f"has more than {_MOST_VALUES} values.")
        return done[1]

    def _sequence(self, value: Any) -> Any:
        parts: list[Any] = []
        self._num_values += len(value)
        try:
            for part in value:
                parts.append(self.of(part))
        except _Refused as refused:
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
        except _Refused as refused:
            refused.path.append(key)
            raise
        more = getattr(value, "__dict__", None)  # of a module's state, the versions
        new_more = {name: self._more(name, part) for name, part in more.items()} if more else {}
        more = more or {}
        if is_same and all(new_more[name] is more[name] for name in new_more):
            return value
        if len(parts) != len(value):  # two names that differ in nothing else keep it
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
            raise _Refused("is the key of a dict, and a tensor.")
        return self.of(key)

    def _more(self, name: str, part: Any) -> Any:
        if name != "_metadata" or not isinstance(part, dict):
            return self.of(part)
        renamed = type(part)()
        for key, versions in part.items():  # what is within comes after its wrapper, and counts
            renamed[self._rename(f"{key}.").removesuffix(".") if isinstance(key, str) else key] = self.of(versions)
        return part if list(renamed) == list(part) else renamed


def _with_data(value: torch.Tensor) -> torch.Tensor:
    if type(value) not in _TENSORS and nn.parameter.is_lazy(value):
        raise _Refused("is not initialized yet, as its module is a lazy one: run one batch through the model first.")
    if value.is_meta:
        raise _Refused("is a tensor on the meta device, which has no data: give it some by to_empty() first.")
    return value


def _as_base(value: Any) -> Any:
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        number = value.item()
        return number if type(number) in _CERTAIN else value
    for base, stored in _BASES:
        if isinstance(value, base):
            return stored(value)
    return value


def _kinds(value: Any) -> Any:
    """The classes that a tensor is made of: such as have been tried need not be again."""
    try:
        names, context = value.__tensor_flatten__()
    except (AttributeError, TypeError, ValueError):
        return type(value)
    inner = tuple(_kinds(getattr(value, name)) for name in names)
    values = context.values() if isinstance(context, Mapping) else context if isinstance(context, tuple) else [context]
    return type(value), inner, tuple(map(type, values))


def _try(value: Any, hint: str) -> Any:
    trial = io.BytesIO()
    try:
        torch.save(value, trial)
        trial.seek(0)
        torch.load(trial, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = type(value)
        lines = str(error).strip().splitlines() or [repr(error)]
        reason = next((line for line in lines if "GLOBAL" in line), lines[0]).strip()
        raise _Refused(
            f"is a {kind.__module__}.{kind.__qualname__} (torch.load(weights_only=True) says: {reason})",
            hint,
            is_pickle=True,
        ) from None
    return value


def _hint(value: Any) -> str:
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return ", as by torch.from_numpy() of it"
    for kinds, hint in (
        (Enum, "its .value"),
        (PurePath, "str() of it"),
        (tuple, "tuple() of it"),
        ((deque, range, list), "list() of it"),
    ):
        if isinstance(value, kinds):
            return f", as by {hint}"
    return ""


def _check_held(value: torch.Tensor) -> torch.Tensor:
    if value.device.type == "meta":
        raise _Refused(f"declares {value.numel()} elements, of which there are none.")
    if value.layout == torch.strided and value.numel() > _MOST_EXPANDED and not is_made_of_others(value):
        held = value.untyped_storage().nbytes() // value.itemsize
        if held < value.numel():
            raise _Refused(f"declares {value.numel()} elements, of which there are {held}.")
    return value
