"""Check that the declarations in `metadata.json` of a sharded checkpoint are possible, before memory is allocated.

Its digest shows that it was not changed, not that its writer meant well. No tensor is made here.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from dengine.checkpoint.formats.sharded.tree import Node, Path, decoded, dtype_named, path_text

__all__ = ["check_declared", "check_parts", "check_states"]

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes

_MOST_ELEMENTS = 1 << 58  # above this, torch cannot count the bytes
_MOST_CELLS = 1 << 22  # of one tensor, if its parts have a layout that no framework makes


def check_declared(states: Node, chunks: Mapping[str, Sequence[Any]], files: Mapping[str, tuple[int, str]]) -> None:
    """Compare the states, the parts of their tensors (`Chunk`s) and the lengths of the files with each other.

    Cost: one visit of each value and each part.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: they do not fit; the message names the tensor.
    """

    def check(path: Path, dtype: torch.dtype, shape: torch.Size) -> None:
        name = path_text(path)
        check_parts(name, dtype, shape, chunks.get(name, ()), files, ((0,) * len(shape), tuple(shape)))

    check_states(states)
    decoded(states, check)


def check_states(states: Node) -> None:
    """Check the form of a tree alone. Raises: as `check_declared`."""
    if not isinstance(states, dict) or states.get("type") != "dict":
        raise ValueError("its states are no dict by name")
    _check_node(states)
    names = [name for name, _ in states["items"]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("its states have names that are no strings")


def check_parts(
    name: str,
    dtype: torch.dtype,
    shape: torch.Size,
    parts: Sequence[Any],
    files: Mapping[str, tuple[int, str]],
    block: Box,
) -> None:
    """Check that the `parts` of a tensor are such, and make up its `block`. Raises: as `check_declared`."""
    for part in parts:
        ends = [offset + size for offset, size in zip(part.offsets, part.sizes, strict=True)]
        if len(ends) != len(shape) or any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ValueError(f"{part} lies outside of {name!r}, {tuple(shape)}")
        if math.prod(part.sizes) * dtype.itemsize != part.num_bytes:
            raise ValueError(f"{part} does not fit {dtype}")
        if part.file not in files or part.start + part.num_bytes > files[part.file][0]:
            raise ValueError(f"{part} of {name!r} lies outside of its file")
    boxes = [(part.offsets, part.sizes) for part in parts if part.num_bytes]
    if len(boxes) > 1 and _overlap(boxes, tuple(shape)):
        holders = ", ".join(sorted({part.file for part in parts})[:4])
        raise ValueError(f"the parts of {name!r} overlap: more than one of {holders} claims the same part")
    if sum(_common(box, block) for box in boxes) != math.prod(block[1]):
        raise ValueError(f"the parts of {name!r} do not make up {tuple(shape)}")


def _common(box: Box, other: Box) -> int:
    """The number of elements that two boxes have in common."""
    return math.prod(
        max(0, min(one + size, two + other_size) - max(one, two))
        for one, size, two, other_size in zip(*box, *other, strict=True)
    )


def _check_node(states: Node) -> None:
    """Check the form of each node that has others inside or is a tensor, on which `decoded` relies."""
    left = [states]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left.extend(node)
        elif isinstance(node, dict):
            left.extend(_within(node))


def _within(node: dict[str, Any]) -> Iterator[Node]:
    kind = node["type"]
    if kind == "tensor":
        dtype_named(node["dtype"])
        shape = node["shape"]
        is_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not is_shape or math.prod(max(1, size) for size in shape) > _MOST_ELEMENTS:
            raise ValueError(f"a tensor of shape {str(shape)[:60]}")
    elif kind == "dict":
        keys = []
        for key, value in node["items"]:
            keys.append(repr(key))
            yield value
        if len(set(keys)) != len(keys):
            raise ValueError("a dict has a key twice")
    elif kind == "names":
        if not isinstance(node["value"], list) or not all(isinstance(name, str) for name in node["value"]):
            raise ValueError("the names of parameters are no strings")
    elif kind == "tuple":
        yield from node["items"]


def _overlap(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether two of `boxes`, which are full and within `shape`, have an element in common."""
    if _are_slabs(boxes, shape):
        return False
    # A grid of all their edges: no cell of it may be used twice.
    positions = []
    for axis in range(len(shape)):
        edges = {edge for offsets, sizes in boxes for edge in (offsets[axis], offsets[axis] + sizes[axis])}
        positions.append({edge: place for place, edge in enumerate(sorted(edges))})
    taken: set[tuple[int, ...]] = set()
    num_cells = 0
    for offsets, sizes in boxes:
        ranges = [
            range(place[offset], place[offset + size])
            for place, offset, size in zip(positions, offsets, sizes, strict=True)
        ]
        num_cells += math.prod(map(len, ranges))
        if num_cells > _MOST_CELLS:
            raise ValueError("a tensor is cut into more pieces than can be")
        taken.update(itertools.product(*ranges))
        if len(taken) != num_cells:
            return True
    return False


def _are_slabs(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether they are cut along one axis and come one after the other, as nearly all are."""
    cut = [axis for axis, size in enumerate(shape) if any(sizes[axis] != size for _, sizes in boxes)]
    if len(cut) != 1:
        return False
    ends = 0
    for offsets, sizes in sorted(boxes, key=lambda box: box[0][cut[0]]):
        if offsets[cut[0]] < ends:
            return False
        ends = offsets[cut[0]] + sizes[cut[0]]
    return True
