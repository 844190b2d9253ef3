"""Check states, so that `torch.load(weights_only=True)` can load what is saved, and check loaded ones.

Both happen before a byte is written or an object is changed. A quick check is enough for the states of nearly all
models, optimizers and engines; for others there is a walk (walk.py).
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
from dengine.naming import a_type

__all__ = ["check_loadable", "check_loaded", "no_state", "plain_states"]

# A subclass of one of these (such as an Enum with str) is saved as the plain value that it equals.
_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, lambda value: bytes(bytearray(value))),
)
_WRAPPER = HIDDEN.removesuffix(".")  # it may also be the whole name of a module
_DEEPEST_PLAIN = 12  # the states of models, optimizers and engines are less deep
# The limit for tensors that declare more elements than they have in memory (expanded ones).
_MOST_EXPANDED = 1 << 31


def plain_states(states: Mapping[str, object]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Each of `states`, by name, as equal plain data, and all tensors in them.

    A member of a `str` enum or a NumPy scalar becomes a string or a number, a `frozenset` a set, and another mapping a
    dict. Names lose the part that `torch.compile` adds. A state without any such value is given as it is.

    Cost: one visit of each value; a second one if there are unusual kinds of values.

    Raises:
        TypeError: a state contains itself, or a tensor without data; the message has the path within the state.
        CheckpointError: a container in the state failed when it was read.
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
    """The error for an object whose `state_dict()` failed."""
    return CheckpointError(f"{name!r} gave no state: {type(error).__qualname__}: {error}")


def check_loadable(states: Mapping[str, object]) -> list[torch.Tensor]:
    """Refuse states that `torch.load(weights_only=True)` could not load. Gives the tensors in `states`.

    Cost: one visit of each value; for a value of an unknown class a trial, for tensors one for each class.

    Raises:
        TypeError: there is such a value; the message has its path within the state.
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
    """Refuse loaded content that is not a finite dict of states, or has tensors without data.

    Cost: one visit of each value; a second one if there are unusual kinds of values.

    Raises:
        ValueError: something is wrong; the message has its path.
    """
    if not isinstance(states, dict) or not all(isinstance(name, str) for name in states):
        raise ValueError(f"it holds {a_type(states)} instead of a dict of states by name")
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
    """Whether `state` is made only of dicts, lists and values of known types. If so, appends its tensors to
    `tensors`.
    """
    found: list[torch.Tensor] = []
    if not _has_plain_parts(state, found, [MOST_VALUES], _DEEPEST_PLAIN):
        return False
    tensors += found
    return True


def _has_plain_parts(value: Any, tensors: list[torch.Tensor], budget: list[int], depth: int) -> bool:
    """Whether `value` is made of dicts and lists, nested at most `depth` deep, with plain values within the `budget`.

    Appends its tensors to `tensors`. A save runs this for each tensor of a model and its optimizer, so it makes no call
    for a tensor.
    """
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        for key in value:
            if type(key) is not int and (type(key) is not str or _WRAPPER in key):
                return False
        parts: Iterable[Any] = value.values()
        if kind is OrderedDict and vars(value):  # a module's state has its versions there
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
    """The classes of a tensor and of the tensors inside it, which need only one trial."""
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
    """The reason why a tensor lacks data that it declares; None if it has all of them."""
    if value.device.type == "meta":
        return f"declares {value.numel()} elements, of which there are none."
    if value.layout == torch.strided and value.numel() > _MOST_EXPANDED and not is_made_of_others(value):
        num_there = value.untyped_storage().nbytes() // value.itemsize
        if num_there < value.numel():
            return f"declares {value.numel()} elements, of which there are {num_there}."
    return None
