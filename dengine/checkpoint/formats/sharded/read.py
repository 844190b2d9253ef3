"""One rank's reading of a sharded checkpoint: which parts of the saved tensors it needs, and where they go.

No collective: each rank looks up for itself what overlaps with what it holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch

from dengine.checkpoint.formats.sharded.files import Chunk, Metadata, checked_chunk, local_box, read_metadata
from dengine.checkpoint.formats.sharded.names import LikeParameters
from dengine.checkpoint.formats.sharded.parts import Parts, Selection
from dengine.checkpoint.formats.sharded.tree import Node, Path, decoded, path_text, tensors_in
from dengine.checkpoint.formats.sharded.verify import check_length
from dengine.compiled_names import without_compiled
from dengine.dtensor import is_dtensor, local_part

__all__ = ["LikeTensors", "read_states", "read_whole_tensor"]

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class LikeTensors:
    """Says how tensors are laid out if they were saved, with the same shape, and asks for none of them.

    By their paths within the state: so an object's own `load_state_dict` can name all that is missing or differs.
    """

    tensors: Mapping[Path, torch.Tensor]

    @classmethod
    def of(cls, state: Any) -> "LikeTensors":
        return cls({_without_compiled(path): tensor for path, tensor in tensors_in(state)})


@dataclass(frozen=True)
class _Copy:
    """`chunk[source]` goes to `destination[target]`, which lies in this rank's memory."""

    chunk: Chunk
    source: Slices
    destination: torch.Tensor
    target: Slices


def read_states(folder: FilePath, like: Mapping[str, object] | None, parts: Parts) -> dict[str, Any]:
    """As `read_shards`, for this rank alone.

    Raises:
        FileNotFoundError, CorruptCheckpointError, ValueError: as there.
    """
    metadata = read_metadata(folder)
    items = metadata.states["items"]
    for name in like or ():
        if name not in [saved for saved, _ in items]:
            raise ValueError(f"{folder} holds no {name!r}, but {', '.join(repr(saved) for saved, _ in items)}.")
    selection = Selection(parts, partial(_is_same, metadata))
    wanted = [[name, node] for name, node in items if like is None or name in like]

    def saved_name(path: Path) -> str:
        return path_text(selection.saved_path(path))

    destinations: dict[Path, torch.Tensor] = {}
    lengths_checked: set[str] = set()

    def make(path: Path, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        template = _template(like, path, shape)
        if template is None:  # all of it is read: before memory is taken for it, it must be there
            for file in {chunk.file for chunk in metadata.chunks.get(saved_name(path), ())} - lengths_checked:
                check_length(folder / file, metadata.files[file][0])
                lengths_checked.add(file)
        destinations[path] = _empty(template, dtype, shape)
        return destinations[path]

    states: dict[str, Any] = decoded(selection.of({"type": "dict", "items": wanted}), make)
    for path, _ in tensors_in(like):
        if path not in destinations:
            raise ValueError(f"{path_text(path)!r} is asked for, but is not among the tensors in {folder}.")
    copies = [
        copy
        for path, destination in destinations.items()
        for copy in _copies(saved_name(path), destination, metadata.chunks)
    ]
    for name in sorted({copy.chunk.file for copy in copies}):
        check_length(folder / name, metadata.files[name][0])
    for copy in sorted(copies, key=lambda copy: (copy.chunk.file, copy.chunk.start)):
        _read(folder, copy)
    return states


def _is_same(metadata: Metadata, one: Path, one_node: Node, other: Path, other_node: Node) -> bool:
    """Whether what lies at two paths is the same, down to the bytes of the tensors."""

    def pieces(path: Path, node: Node) -> list[object]:
        found: list[object] = [repr(node)]

        def make(inner: Path, dtype: torch.dtype, shape: torch.Size) -> None:
            chunks = metadata.chunks.get(path_text((*path, *inner)), ())
            found.append(sorted((chunk.offsets, chunk.sizes, chunk.sha256) for chunk in chunks))

        decoded(node, make)
        return found

    return pieces(one, one_node) == pieces(other, other_node)


def read_whole_tensor(folder: FilePath, chunks: Sequence[Chunk], dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """The tensor that the parts `chunks` make up, on the CPU.

    Raises:
        CorruptCheckpointError: a part is missing, or was changed.
    """
    whole = torch.empty(shape, dtype=dtype)
    for copy in _copies("", whole, {"": chunks}):
        _read(folder, copy)
    return whole


def _read(folder: FilePath, copy: _Copy) -> None:
    part = checked_chunk(folder, copy.chunk, copy.destination.dtype)
    _as_bits(copy.destination)[copy.target].copy_(_as_bits(part)[copy.source])


def _template(like: Any, path: Path, shape: torch.Size) -> torch.Tensor | None:
    """The tensor in `like` that says how the one at `path` is laid out.

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


def _copies(name: str, destination: torch.Tensor, saved: Mapping[str, Sequence[Chunk]]) -> Iterator[_Copy]:
    """What of the saved tensor `name` this rank holds in `destination`, part by part."""
    chunks = saved.get(name, ())
    box = local_box(name, destination)
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
    """The same memory as a dtype that can be copied: torch has names for uint1 to int7, and little else for them."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _within(starts: Sequence[int], ends: Sequence[int], offsets: Sequence[int]) -> Slices:
    """A range of the whole tensor, as a range of the part that begins at `offsets`."""
    return tuple(slice(start - at, end - at) for start, end, at in zip(starts, ends, offsets, strict=True))
