"""Walk nested containers: their parts, their leaves, and a copy with other leaves. Pure, and without torch.

A container is a dict or another mapping, a list, a tuple, a named tuple or a dataclass object, subclasses included;
everything else is a leaf, also a set, an array and a tensor. `torch.utils._pytree` is not used, because it is private,
knows a dataclass only if somebody has registered its class, and takes a subclass of dict for a leaf.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeVar

__all__ = ["has_names", "leaves", "map_leaves", "named_leaves", "parts", "with_parts"]

T = TypeVar("T")

# The kind is remembered for this many types: a leaf costs one look-up instead of an isinstance() for each kind.
_NUM_TYPES = 1024


class _Kind(NamedTuple):
    has_names: bool
    parts: Callable[[Any], list[tuple[Any, Any]]]
    with_parts: Callable[[Any, list[Any]], Any]


def parts(value: object) -> list[tuple[Any, Any]] | None:
    """The parts of a container with their keys, indices or names of fields, in its own order; None for a leaf."""
    kind = _KINDS[type(value)]
    return None if kind is None else kind.parts(value)


def with_parts(value: T, new: Sequence[object]) -> T:
    """A container like `value` that holds `new`, in the order of `parts(value)`. `value` stays as it is.

    It is of the same type, with its other attributes (the factory of a defaultdict); of a mapping that cannot be
    changed it is a dict. `__init__` and `__post_init__` of a dataclass do not run.
    """
    kind = _KINDS[type(value)]
    assert kind is not None, "a leaf has no parts"
    container: T = kind.with_parts(value, list(new))
    return container


def has_names(value: object) -> bool:
    """Whether `value` is a container whose parts have names: any but a plain list or tuple."""
    kind = _KINDS[type(value)]
    return kind is not None and kind.has_names


def map_leaves(function: Callable[[Any], Any], value: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`value` with each leaf replaced by `function` of it; an object for which `is_leaf` is true is a leaf, too.

    `is_leaf` is not asked about a plain dict, list or tuple.
    """
    of = type(value)
    if of is dict:  # the common types have their own code: a step's output goes through here once an iteration
        return {
            key: function(part) if _KINDS[type(part)] is None else map_leaves(function, part, is_leaf)
            for key, part in value.items()
        }
    if of is list or of is tuple:
        return of(
            [function(part) if _KINDS[type(part)] is None else map_leaves(function, part, is_leaf) for part in value]
        )
    kind = _KINDS[of]
    if kind is None or (is_leaf is not None and is_leaf(value)):
        return function(value)
    return kind.with_parts(value, [map_leaves(function, part, is_leaf) for _, part in kind.parts(value)])


def leaves(value: object) -> Iterator[Any]:
    """The leaves of `value`, depth first."""
    kind = _KINDS[type(value)]
    if kind is None:
        yield value
        return
    for _, part in kind.parts(value):
        yield from leaves(part)


def named_leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of `value` by the path that leads to them: `optimizer.state.0.step`."""
    inside = parts(value)
    if inside is None:
        yield path, value
        return
    for key, part in inside:
        yield from named_leaves(part, f"{path}.{key}" if path else str(key))


# -- the kinds of containers -------------------------------------------------------------------------------------


class _Kinds(dict[type, "_Kind | None"]):
    """The kind of container of a type; None for a leaf."""

    def __missing__(self, of: type) -> _Kind | None:
        if len(self) >= _NUM_TYPES:  # of a program that makes types as it runs
            self.clear()
        kind = self[of] = _kind(of)
        return kind


_KINDS = _Kinds()


def _kind(of: type[Any]) -> _Kind | None:
    if of is dict:
        return _Kind(True, _items, _as_dict)
    if issubclass(of, MutableMapping):
        return _Kind(True, _items, _with_items)
    if issubclass(of, Mapping):
        return _Kind(True, _items, _as_dict)
    if issubclass(of, tuple) and (make := getattr(of, "_make", None)):
        return _Kind(True, _named_items, _made_by(make))
    if issubclass(of, (list, tuple)):
        return _Kind(False, _enumerated, _made_by(of))
    if dataclasses.is_dataclass(of):
        return _Kind(True, _fields, _with_fields)
    return None


def _items(value: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    return list(value.items())


def _named_items(value: Any) -> list[tuple[Any, Any]]:
    return list(zip(value._fields, value, strict=True))


def _enumerated(value: Iterable[Any]) -> list[tuple[Any, Any]]:
    return list(enumerate(value))


def _fields(value: Any) -> list[tuple[Any, Any]]:
    """Those that are set: a field may have been deleted, or not be there yet."""
    names = [field.name for field in dataclasses.fields(value)]
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _as_dict(value: Mapping[Any, Any], new: list[Any]) -> dict[Any, Any]:
    return dict(zip(value, new, strict=True))


def _with_items(value: MutableMapping[Any, Any], new: list[Any]) -> Any:
    # By its own copy(): it keeps what an ordered dict, a defaultdict or the output of a model has besides its items.
    own: Any = getattr(value, "copy", None)
    copied = own() if callable(own) else copy.copy(value)
    for key, part in zip(value, new, strict=True):
        copied[key] = part
    return copied


def _made_by(make: Callable[[list[Any]], Any]) -> Callable[[Any, list[Any]], Any]:
    return lambda _, new: make(new)


def _with_fields(value: Any, new: list[Any]) -> Any:
    copied = copy.copy(value)
    for (name, _), part in zip(_fields(value), new, strict=True):
        object.__setattr__(copied, name, part)  # it may be frozen
    return copied
