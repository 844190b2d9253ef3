"""What a state may hold, so that `torch.load(weights_only=True)` brings it back; and what a loaded one may.

Both are checked before a byte is written or anything is given to an object: by one quick look, which suffices for the
states of nearly all models, optimizers and engines, or else by a walk (walk.py).
"""

import io
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from dengine.checkpoint.states.walk import CERTAIN, MOST_VALUES, Refused, Walk
from dengine.compiled_names import HIDDEN, without_compiled
from dengine.dtensor import PLAIN, is_made_of_others
from dengine.errors import CheckpointError

__all__ = ["check_loadable", "check_loaded", "no_state", "plain_states"]

# What a subclass of one of these (an Enum with str, say) equals, and is stored as.
_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, lambda value: bytes(bytearray(value))),
)
_WRAPPER = HIDDEN.removesuffix(".")  # as the whole name of a module has it, too
_DEEPEST_PLAIN = 12  # the states of models, optimizers and engines are less deep
# A tensor that declares more than it holds (an expanded one) may be that large.
_MOST_EXPANDED = 1 << 31


def plain_states(states: Mapping[str, object]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Each of `states`, by name, as plain data that equals it, and all tensors in them. A member of a `str` enum or a
    scalar of NumPy's becomes a string or a number, a `frozenset` a set, another mapping a dict; and names lose what
    `torch.compile` has put into them. A state in which there is nothing to change is given as it is.

    Cost: one visit of each value; a second one if it is not of the commonest kinds alone.

    Raises:
        TypeError: a state that contains itself, or a tensor without data; it names the path within the state.
        CheckpointError: a container of the state's own failed as it was read.
    """
    tensors: list[torch.Tensor] = []

    def tensor(value: torch.Tensor) -> torch.Tensor:
        tensors.append(value)
        return _with_data(value)

    plain = dict(states)
    for name, state in states.items():
        if not _is_plain(state, tensors):
            try:
                plain[name] = _walked(name, state, Walk(tensor, _as_base, without_compiled))
            except TypeError:
                raise
            except Exception as error:  # of a container of the state's own
                raise no_state(name, error) from error
    return plain, tensors


def no_state(name: str, error: Exception) -> CheckpointError:
    """The error for an object whose own code failed as its state was taken."""
    return CheckpointError(f"{name!r} gave no state: {type(error).__qualname__}: {error}")


def check_loadable(states: Mapping[str, object]) -> list[torch.Tensor]:
    """Refuse what `torch.load(weights_only=True)` would refuse: a checkpoint that nobody can load is none. Gives the
    tensors in `states`.

    Cost: one visit of each value; a trial of each that is of a class that is not known, of tensors one for each class.

    Raises:
        TypeError: names the path within the state.
    """
    tensors: list[torch.Tensor] = []
    tried: set[Any] = set()

    def tensor(value: torch.Tensor) -> torch.Tensor:
        tensors.append(value)
        if type(value) not in PLAIN and (kinds := _kinds(value)) not in tried:
            hint = ", or import the library that has the class, which may have declared it safe to torch"
            _try(value, f"{hint} (torch.serialization.add_safe_globals)")
            tried.add(kinds)
        return value

    for name, state in states.items():
        if not _is_plain(state, tensors):
            _walked(name, state, Walk(tensor, lambda value: _try(value, _hint(value)), lambda key: key))
    return tensors


def check_loaded(states: object) -> None:
    """Refuse what was read if it cannot be used: it must be a dict of states, finite, of tensors that have their data.

    Cost: one visit of each value; a second one if it is not of the commonest kinds alone.

    Raises:
        ValueError: names the path of what is wrong.
    """
    if not isinstance(states, dict) or not all(isinstance(name, str) for name in states):
        raise ValueError(f"it holds a {type(states).__qualname__} in the place of a dict of states by name")
    tensors: list[torch.Tensor] = []
    if _is_plain(states, tensors) and not any(map(_lack, tensors)):
        return
    try:
        Walk(_check_complete, lambda value: value, lambda name: name).of(states)
    except Refused as refused:
        raise ValueError(f"{'/'.join(map(str, reversed(refused.path)))!r} {refused.reason}") from None


def _walked(name: str, state: Any, walk: Walk) -> Any:
    try:
        return walk.of(state)
    except Refused as refused:
        raise TypeError(refused.text(name)) from None


def _is_plain(state: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether `state` is made of dicts, lists, and what is known for certain alone; then its tensors are put into
    `tensors`."""
    found: list[torch.Tensor] = []
    if not _has_plain_parts(state, found, [MOST_VALUES], _DEEPEST_PLAIN):
        return False
    tensors += found
    return True


def _has_plain_parts(value: Any, tensors: list[torch.Tensor], budget: list[int], depth: int) -> bool:
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
        elif kind not in CERTAIN and not _has_plain_parts(part, tensors, budget, depth - 1):
            return False
    return True


def _with_data(value: torch.Tensor) -> torch.Tensor:
    if type(value) not in PLAIN and nn.parameter.is_lazy(value):
        raise Refused("is not initialized yet, as its module is a lazy one: run one batch through the model first.")
    if value.is_meta:
        raise Refused("is a tensor on the meta device, which has no data: give it some by to_empty() first.")
    return value


def _as_base(value: Any) -> Any:
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        number = value.item()
        return number if type(number) in CERTAIN else value
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
        raise Refused(
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


def _check_complete(value: torch.Tensor) -> torch.Tensor:
    if (lack := _lack(value)) is not None:
        raise Refused(lack)
    return value


def _lack(value: torch.Tensor) -> str | None:
    """What a tensor declares and does not hold; None if it has all of its data."""
    if value.device.type == "meta":
        return f"declares {value.numel()} elements, of which there are none."
    if value.layout == torch.strided and value.numel() > _MOST_EXPANDED and not is_made_of_others(value):
        num_there = value.untyped_storage().nbytes() // value.itemsize
        if num_there < value.numel():
            return f"declares {value.numel()} elements, of which there are {num_there}."
    return None
