"""Convert nested states to JSON and back. A tensor is replaced by its path, all other values are written out. Pure.

JSON has no tuples, no keys other than strings, no NaN, bytes or dtypes; so every node that is not plain has its type.
Reading looks up dtypes and devices by name and builds nothing else: it cannot run code.
"""

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch

__all__ = [
    "Apart",
    "Names",
    "Node",
    "Path",
    "TensorMaker",
    "all_tensors",
    "decoded",
    "dtype_name",
    "dtype_named",
    "encoded",
    "path_text",
    "tensors_in",
]

Node: TypeAlias = Any  # a value of json.loads
Path: TypeAlias = tuple[Any, ...]  # of keys and indices in lists, from the root
# (path of a tensor, its dtype, its whole shape) -> its placeholder in the tree
TensorMaker: TypeAlias = Callable[[Path, torch.dtype, torch.Size], Any]


class Names(list[str]):
    """Names of an optimizer's parameters; other ranks may have other ones."""


class Apart(dict[Any, Any]):
    """A dict in which names of several parts are kept apart, such as `pp=0/weight` and `pp=1/weight`."""


_MOST_LEVELS = 400  # of nested containers: below the recursion limit of every Python
_WHOLE_NUMBERS = (bool, int, str, type(None))


def encoded(value: Any, tensors: dict[str, torch.Tensor], path: Path = ()) -> Node:
    """`value` as JSON; its tensors are put into `tensors` under the text of their paths.

    Raises:
        TypeError: a value cannot be written as data (the message has its path), two keys have the same text, or it is
            nested too deep.
    """
    if len(path) > _MOST_LEVELS:
        raise TypeError(f"{_too_deep(path)}: a state may hold itself, by mistake.")
    if isinstance(value, torch.Tensor):
        tensors[_free_name(path, tensors)] = value
        return {"type": "tensor", "dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    if type(value) in _WHOLE_NUMBERS:
        return value
    if isinstance(value, Mapping):
        items = [[encoded(key, {}), encoded(part, tensors, (*path, key))] for key, part in value.items()]
        return {"type": "dict", "items": items, **({"apart": True} if type(value) is Apart else {})}
    if type(value) in (list, tuple):
        parts = [encoded(part, tensors, (*path, index)) for index, part in enumerate(value)]
        return parts if type(value) is list else {"type": "tuple", "items": parts}
    return _encoded_leaf(value, path)


def decoded(node: Node, make: TensorMaker, path: Path = ()) -> Any:
    """The value from which `encoded` made `node`, with the result of `make` for each tensor.

    Raises:
        ValueError, TypeError, KeyError: the node is invalid, or nested too deep.
    """
    if len(path) > _MOST_LEVELS:
        raise ValueError(_too_deep(path))
    if isinstance(node, list):
        return [decoded(part, make, (*path, index)) for index, part in enumerate(node)]
    if not isinstance(node, dict):
        return node
    kind = node["type"]
    if kind == "tensor":
        return make(path, dtype_named(node["dtype"]), torch.Size(node["shape"]))
    if kind == "dict":
        keys = [decoded(key, make) for key, _ in node["items"]]
        return {key: decoded(part, make, (*path, key)) for key, (_, part) in zip(keys, node["items"], strict=True)}
    if kind == "tuple":
        return tuple(decoded(part, make, (*path, index)) for index, part in enumerate(node["items"]))
    return _LEAVES[kind](node["value"])


def tensors_in(value: object, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """The tensors in `value`, each with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_in(part, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from tensors_in(part, (*path, index))


def all_tensors(value: object) -> list[torch.Tensor]:
    """The tensors in `value`, in no particular order. For a save, this is cheaper than paths."""
    left, tensors = [value], []
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            tensors.append(each)
        elif isinstance(each, (dict, Mapping)):
            left.extend(each.values())
        elif isinstance(each, (list, tuple)):
            left.extend(each)
    return tensors


def path_text(path: Path) -> str:
    """A path as one string, for messages and as a tensor's name: `model/layer.weight`."""
    return "/".join(str(part) for part in path)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_named(name: object) -> torch.dtype:
    """The dtype with this name.

    Raises:
        ValueError: this torch has no such dtype.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch {torch.__version__} has no dtype {name!r}.")
    return dtype


def _too_deep(path: Path) -> str:
    return f"{path_text(path[:3])!r} is nested more than {_MOST_LEVELS} levels deep"


def _free_name(path: Path, taken: dict[str, torch.Tensor]) -> str:
    name = path_text(path)
    if name in taken:
        raise TypeError(f"Two tensors of one path cannot be told apart: {name!r}. Rename a key (1 and '1' read alike).")
    return name


def _encoded_leaf(value: Any, path: Path) -> Node:
    if type(value) is float:
        return value if math.isfinite(value) else {"type": "float", "value": repr(value)}
    if type(value) is complex:
        return {"type": "complex", "value": [encoded(value.real, {}), encoded(value.imag, {})]}
    if type(value) is bytes:
        return {"type": "bytes", "value": base64.b64encode(value).decode()}
    if type(value) is Names:
        return {"type": "names", "value": list(value)}
    if type(value) is torch.Size:
        return {"type": "size", "value": list(value)}
    if isinstance(value, torch.dtype):
        return {"type": "dtype", "value": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"type": "device", "value": str(value)}
    if type(value) in (set, frozenset):
        return {"type": type(value).__name__, "value": [encoded(part, {}) for part in sorted(value, key=repr)]}
    raise TypeError(
        f"{path_text(path)!r} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be written as "
        "data: a state holds tensors, numbers, strings, bytes, and lists, tuples, sets and dicts of them."
    )


def _no_tensor(path: Path, dtype: torch.dtype, shape: torch.Size) -> Any:
    raise ValueError("A set holds no tensor.")


_LEAVES: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "complex": lambda parts: complex(*(decoded(part, _no_tensor) for part in parts)),
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "names": lambda names: Names(map(str, names)),
    "size": torch.Size,
    "dtype": dtype_named,
    "device": torch.device,
    "set": lambda parts: {decoded(part, _no_tensor) for part in parts},
    "frozenset": lambda parts: frozenset(decoded(part, _no_tensor) for part in parts),
}
