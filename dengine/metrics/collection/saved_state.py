"""Save the state of a metric as plain data, so that an epoch that is resumed in its middle counts everything.

Each attribute becomes one entry, a dict whose first key says what it was:

    {"value": 3}                    numbers, strings, None, tensors, and lists and dicts of nothing else
    {"metric": {name: entry}}       an object with a state of its own: another metric, a meter, a dataclass
    {"parts": {name: entry}}        a torch.nn.Module that contains metrics: a ModuleList, a ModuleDict
    {"list": [entry]}               also "tuple", "set", "deque"; None for an item that is not kept
    {"dict": [[key, entry]]}        also a Counter, a defaultdict and other subclasses, and any kind of key
    {"array": tensor}               a numpy array; "scalar" for one of numpy's numbers
    {"enum": value}                 a member of an enum, by its value; "class" says which enum
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import torch

from dengine import trees
from dengine.launch.world import world
from dengine.metrics.core.kinds import is_metric
from dengine.metrics.core.metric import Metric

__all__ = ["load_state_dict", "state_dict"]

Entry: TypeAlias = dict[str, Any]

_RENAMED = {"_leaf": "_stateful"}  # attributes that files of earlier versions have under another name
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


def state_dict(metric: object) -> dict[str, Entry]:
    """The entries of the attributes of `metric`, and of metrics inside it, however nested. Tensors are copied to the
    CPU.

    Attributes of other kinds are what the metric was built with, and have no entry.
    """
    return _state_dict(metric, set())


def load_state_dict(metric: object, state: dict[str, Entry]) -> None:
    """Set the attributes of `metric` to what `state_dict` gave. Tensors stay on their present devices."""
    if isinstance(metric, Metric):
        metric.flush()  # queued batches belong to the state that is replaced
    now = _attributes(metric)
    for given_name, entry in state.items():
        name = _RENAMED.get(given_name, given_name)
        if "metric" in entry or "parts" in entry:
            if name in now:
                _restored(entry, now[name])
        else:
            _set(metric, name, _restored(entry, now.get(name)))


# -- out -----------------------------------------------------------------------------------------------------------


def _state_dict(metric: object, seen: set[int]) -> dict[str, Entry]:
    seen.add(id(metric))
    if isinstance(metric, Metric):
        metric.flush()
    return _entries(_attributes(metric), seen)


def _entries(parts: dict[str, Any], seen: set[int]) -> dict[str, Entry]:
    found = ((name, _entry(value, seen)) for name, value in parts.items())
    return {name: entry for name, entry in found if entry is not None}


def _entry(value: Any, seen: set[int]) -> Entry | None:
    """The entry of `value`; None if nothing of it is kept. `seen` has the objects around it, against cycles."""
    if _is_plain(value, seen):
        device = _device_of(value)
        return {"value": _copied(value)} if device is None else {"value": _copied(value), "device": device}
    if isinstance(value, Enum):
        return _enum_entry(value)
    if isinstance(value, np.ndarray | np.generic):
        return _array_entry(value)
    if id(value) in seen:
        return None
    if _gathers(value):
        return {"metric": _state_dict(value, seen)}
    if isinstance(value, torch.nn.Module):
        seen.add(id(value))
        parts = _entries(dict(value.named_children()), seen)
        return {"parts": parts} if parts else None
    if isinstance(value, dict | list | tuple | set | frozenset | deque):
        return _container_entry(value, seen | {id(value)})
    return None


def _container_entry(value: Any, seen: set[int]) -> Entry | None:
    """The entry of a container of more than plain values; None if nothing in it is kept."""
    if isinstance(value, dict):
        pairs = [[_entry(key, seen), _entry(each, seen)] for key, each in value.items()]
        pairs = [pair for pair in pairs if None not in pair]
        return {"dict": pairs} if pairs or not value else None
    entries = [_entry(each, seen) for each in value]
    kind = next(name for name, one in _SEQUENCES.items() if isinstance(value, one))
    return {kind: entries} if not entries or any(entries) else None


def _enum_entry(value: Enum) -> Entry | None:
    kind = type(value)
    if type(value.value) not in _PLAIN:
        return None
    return {"enum": value.value, "class": f"{kind.__module__}:{kind.__qualname__}"}


def _array_entry(value: "np.ndarray[Any, Any] | np.generic") -> Entry | None:
    try:
        tensor = torch.from_numpy(np.array(value))
    except (TypeError, ValueError):  # strings, objects, dates; bytes in another order
        return None
    return {"array" if isinstance(value, np.ndarray) else "scalar": tensor}


def _gathers(value: Any) -> bool:
    """Whether it is an object whose own attributes are a state: a metric, a meter (`reset`, `update`), a dataclass."""
    if isinstance(value, type):
        return False
    if is_metric(value):
        return True
    if isinstance(value, torch.nn.Module | dict):
        return False
    if is_dataclass(value):
        return not getattr(value, "__dataclass_params__").frozen  # noqa: B009 - unknown to type checkers
    return callable(getattr(value, "reset", None)) and callable(getattr(value, "update", None))


def _is_plain(value: Any, seen: set[int]) -> bool:
    """Whether it is of exactly these types: a subclass, such as an enum of strings, would need a pickle."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, torch.Tensor):
        return True
    if (kind is not list and kind is not dict) or id(value) in seen:
        return False
    inside = seen | {id(value)}
    if kind is list:
        return all(_is_plain(each, inside) for each in value)
    return all(type(key) in (str, int) and _is_plain(each, inside) for key, each in value.items())


def _device_of(value: Any) -> str | None:
    """The kind of device of the tensors in a list or dict, which may be empty after a reset."""
    return next((device for part in trees.leaves(value) if (device := _device_of_leaf(part))), None)


def _device_of_leaf(leaf: Any) -> str | None:
    return leaf.device.type if isinstance(leaf, torch.Tensor) and not leaf.is_cpu else None


def _copied(value: Any) -> Any:
    return trees.map_leaves(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, torch.Tensor) else leaf, value)


# -- and back ------------------------------------------------------------------------------------------------------


def _restored(entry: Entry, now: Any) -> Any:
    """The value of an entry. Lists and dicts are filled in place, as another attribute may refer to them."""
    (kind, kept), *_ = entry.items()
    if kind in _SEQUENCES:
        return _restored_sequence(_SEQUENCES[kind], kept, now)
    return _RESTORE[kind](kept, now, entry)


def _restored_value(kept: Any, now: Any, entry: Entry) -> Any:
    placed = _placed(kept, now.device if isinstance(now, torch.Tensor) else _own_device(entry.get("device")))
    if type(now) is type(placed) is list:
        now[:] = placed
        return now
    return _refilled(now, placed) if type(now) is type(placed) is dict else placed


def _restored_metric(kept: dict[str, Entry], now: Any, _: Entry) -> Any:
    if now is not None:  # a container that had fewer items when it was built
        load_state_dict(now, kept)
    return now


def _restored_parts(kept: dict[str, Entry], now: Any, _: Entry) -> Any:
    children = dict(now.named_children())
    for name, entry in kept.items():
        if name in children:
            _restored(entry, children[name])
    return now


def _restored_dict(kept: list[list[Entry]], now: Any, _: Entry) -> Any:
    keys = [_restored(key, None) for key, _ in kept]
    before = dict(now) if isinstance(now, dict) else {}
    values = [_restored(entry, before.get(key)) for key, (_, entry) in zip(keys, kept, strict=True)]
    fresh = dict(zip(keys, values, strict=True))
    # Items without an entry stay: the dict was built with them.
    stays = {key: value for key, value in before.items() if key not in fresh and _entry(value, set()) is None}
    return _refilled(now, {**stays, **fresh}) if isinstance(now, dict) else fresh


def _restored_sequence(kind: type, kept: list[Entry | None], now: Any) -> Any:
    ordered = isinstance(now, list | tuple | deque)
    before: Iterator[Any] = iter(now if ordered else ())
    values = []
    for entry in kept:
        like = next(before, None)
        values.append(like if entry is None else _restored(entry, like))
    if isinstance(now, kind) and hasattr(now, "clear"):
        now.clear()
        (now.update if kind is set else now.extend)(values)  # type: ignore[attr-defined]
        return now
    return type(now)(*values) if isinstance(now, kind) and hasattr(now, "_fields") else kind(values)


def _restored_array(kept: torch.Tensor, now: Any, _: Entry) -> Any:
    return kept.clone().numpy()


def _restored_scalar(kept: torch.Tensor, now: Any, _: Entry) -> Any:
    return kept.numpy()[()]


def _restored_enum(kept: Any, now: Any, entry: Entry) -> Any:
    """The member of the enum with the same name, if its module is imported already: nothing is imported here."""
    module, _, path = entry["class"].partition(":")
    kind: Any = sys.modules.get(module)
    for name in path.split("."):
        kind = getattr(kind, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        kind = type(now)  # of a class inside a function
    return kind(kept) if issubclass(kind, Enum) else kept


_RESTORE: dict[str, Callable[[Any, Any, Entry], Any]] = {
    "value": _restored_value,
    "metric": _restored_metric,
    "parts": _restored_parts,
    "dict": _restored_dict,
    "array": _restored_array,
    "scalar": _restored_scalar,
    "enum": _restored_enum,
}


def _refilled(now: dict[Any, Any], fresh: dict[Any, Any]) -> dict[Any, Any]:
    now.clear()
    for key, value in fresh.items():
        now[key] = value
    return now


def _placed(value: Any, device: torch.device | None) -> Any:
    def place(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.clone() if device is None else leaf.to(device, copy=True)

    return trees.map_leaves(place, value)


def _own_device(kind: str | None) -> torch.device | None:
    """This rank's device of the given kind; None if it has none."""
    own = world().device
    return own if kind == own.type else None


# -- attributes ----------------------------------------------------------------------------------------------------


def _attributes(value: Any) -> dict[str, Any]:
    """All attributes: also those in slots, and the children of a `torch.nn.Module` (torchmetrics)."""
    slots = [name for base in type(value).__mro__ for name in _slots(base) if hasattr(value, name)]
    found = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
    children = found.pop("_modules", None) if isinstance(value, torch.nn.Module) else None
    return {**found, **(children or {})}


def _slots(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _set(metric: object, name: str, value: Any) -> None:
    # Not by __setattr__, with which torchmetrics protects its attributes.
    if hasattr(metric, "__dict__") and not any(name in _slots(base) for base in type(metric).__mro__):
        vars(metric)[name] = value
    else:
        object.__setattr__(metric, name, value)
