"""Read the parts of a sharded checkpoint that one rank needs.

No collective: each rank finds the saved parts that overlap with its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch

from dengine.checkpoint.formats.sharded.boxes import TensorBox, local_box
from dengine.checkpoint.formats.sharded.files import Chunk, checked_chunk
from dengine.checkpoint.formats.sharded.names import LikeParameters
from dengine.checkpoint.formats.sharded.parts import Parts, Selection
from dengine.checkpoint.formats.sharded.saved import Saved, open_saved
from dengine.checkpoint.formats.sharded.tree import Node, Path, decoded, dtype_name, path_text, tensors_in
from dengine.checkpoint.formats.sharded.verify import check_length
from dengine.compiled_names import without_compiled
from dengine.distributed import world
from dengine.dtensor import is_dtensor, local_part

__all__ = ["LikeRank", "LikeTensors", "read_states", "read_whole_tensor"]

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class LikeTensors:
    """The layouts of tensors, by their paths within the state, for those that were saved with the same shape.

    It requires none of them, so that an object's own `load_state_dict` can name all that are missing or differ.
    """

    tensors: Mapping[Path, torch.Tensor]

    @classmethod
    def of(cls, state: Any) -> "LikeTensors":
        return cls({_without_compiled(path): tensor for path, tensor in tensors_in(state)})


@dataclass(frozen=True)
class LikeRank:
    """A state that each rank has for itself, in a dict by rank; those of other ranks are not read."""


@dataclass(frozen=True)
class _Copy:
    """A copy of `chunk[source]` to `destination[target]` in this rank's memory."""

    chunk: Chunk
    source: Slices
    destination: torch.Tensor
    target: Slices


def read_states(folder: FilePath, like: Mapping[str, object] | None, parts: Parts, rank: int = 0) -> dict[str, Any]:
    """Read as `read_shards` does, but for this rank alone.

    Raises:
        FileNotFoundError, CorruptCheckpointError, ValueError: as there.
    """
    saved = open_saved(folder)
    items = saved.states(parts, rank)["items"]
    for name in like or ():
        if name not in [saved_name for saved_name, _ in items]:
            raise ValueError(f"{folder} holds no {name!r}, but {', '.join(repr(each) for each, _ in items)}.")
    selection = Selection(parts, partial(_is_same, saved), world().mesh_sizes, saved.mesh_sizes)
    wanted = [
        [name, _of_rank(node, rank) if like is not None and isinstance(like[name], LikeRank) else node]
        for name, node in items
        if like is None or name in like
    ]
    tree = selection.of({"type": "dict", "items": wanted})
    found: dict[Path, Sequence[Chunk]] = {}

    # First where all of it is: before memory is taken for it, it must be there.
    def find(path: Path, dtype: torch.dtype, shape: torch.Size) -> None:
        template = _template(like, path, shape)
        name = path_text(selection.saved_path(path))
        box = _whole_box(shape, dtype) if template is None else local_box(name, template)
        found[path] = saved.pieces(name, dtype, box)

    decoded(tree, find)
    for path, _ in tensors_in(like):
        if path not in found:
            raise ValueError(f"{path_text(path)!r} is asked for, but is not among the tensors in {folder}.")
    for file in sorted({chunk.file for chunks in found.values() for chunk in chunks}):
        check_length(folder / file, saved.length_of(file))
    copies: list[_Copy] = []

    def make(path: Path, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        destination = _empty(_template(like, path, shape), dtype, shape)
        copies.extend(_copies(destination, found[path]))
        return destination

    states: dict[str, Any] = decoded(tree, make)
    for copy in sorted(copies, key=lambda copy: (copy.chunk.file, copy.chunk.start)):
        _read(folder, copy)
    return states


def _of_rank(node: Node, rank: int) -> Node:
    if not isinstance(node, dict) or node["type"] != "dict":
        return node
    return {**node, "items": [[key, value] for key, value in node["items"] if type(key) is not int or key == rank]}


def _whole_box(shape: torch.Size, dtype: torch.dtype) -> TensorBox:
    return TensorBox(tuple(shape), dtype_name(dtype), (0,) * len(shape), tuple(shape))


def _is_same(saved: Saved, one: Path, one_node: Node, other: Path, other_node: Node) -> bool:
    """Whether the values at two paths are equal, including the bytes of tensors."""

    def pieces(path: Path, node: Node) -> list[object]:
        found: list[object] = [repr(node)]

        def make(inner: Path, dtype: torch.dtype, shape: torch.Size) -> None:
            chunks = saved.pieces(path_text((*path, *inner)), dtype, _whole_box(shape, dtype))
            found.append(sorted((chunk.offsets, chunk.sizes, chunk.sha256) for chunk in chunks))

        decoded(node, make)
        return found

    return pieces(one, one_node) == pieces(other, other_node)


def read_whole_tensor(folder: FilePath, chunks: Sequence[Chunk], dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """The whole tensor from its parts `chunks`, on the CPU.

    Raises:
        CorruptCheckpointError: a part is missing, or was changed.
    """
    whole = torch.empty(shape, dtype=dtype)
    for copy in _copies(whole, chunks):
        _read(folder, copy)
    return whole


def _read(folder: FilePath, copy: _Copy) -> None:
    part = checked_chunk(folder, copy.chunk, copy.destination.dtype)
    _as_bits(copy.destination)[copy.target].copy_(_as_bits(part)[copy.source])


def _template(like: Any, path: Path, shape: torch.Size) -> torch.Tensor | None:
    """The tensor in `like` that gives the layout of the one at `path`.

    Raises:
        ValueError: it has another shape.
    """
    for depth, part in enumerate(path):
        template = None
        if isinstance(like, LikeTensors):
            template = like.tensors.get(_without_compiled(path[depth:]))
        elif isinstance(like, LikeParameters) and path[depth] == "state" and isinstance(path[depth + 1], str):
            template = like.parameters.get(without_compiled(path[depth + 1]))
        if isinstance(like, LikeTensors | LikeParameters):
            return template if template is not None and template.shape == shape else None
        if isinstance(like, Mapping):
            like = like.get(part)
        elif isinstance(like, (list, tuple)) and isinstance(part, int) and part < len(like):
            like = like[part]
        else:
            return None
    if not isinstance(like, torch.Tensor):
        return None
    if like.shape != shape:
        raise ValueError(
            f"{path_text(path)!r} was saved with shape {tuple(shape)}, but is asked for with {tuple(like.shape)}."
        )
    return like


def _without_compiled(path: Path) -> Path:
    return tuple(without_compiled(part) if isinstance(part, str) else part for part in path)


def _empty(template: torch.Tensor | None, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if template is None:
        return torch.empty(shape, dtype=dtype)
    if is_dtensor(template):
        return torch.empty_like(template.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=template.device)


def _copies(destination: torch.Tensor, chunks: Sequence[Chunk]) -> Iterator[_Copy]:
    """What of the saved `chunks` of a tensor this rank holds in `destination`, part by part."""
    box = local_box("", destination)
    if box.num_elements == 0:
        return
    for chunk in chunks:
        starts = [max(one, other) for one, other in zip(chunk.offsets, box.offsets, strict=True)]
        ends = [
            min(offset + size, other_offset + other_size)
            for offset, size, other_offset, other_size in zip(
                chunk.offsets, chunk.sizes, box.offsets, box.sizes or (), strict=True
            )
        ]
        if all(start < end for start, end in zip(starts, ends, strict=True)):
            source, target = _within(starts, ends, chunk.offsets), _within(starts, ends, box.offsets)
            yield _Copy(chunk, source, local_part(destination), target)


def _as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with a dtype that can be copied: torch has uint1 to int7, but few operations for them."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _within(starts: Sequence[int], ends: Sequence[int], offsets: Sequence[int]) -> Slices:
    """A range of the whole tensor, as a range of the part that begins at `offsets`."""
    return tuple(slice(start - at, end - at) for start, end, at in zip(starts, ends, offsets, strict=True))
