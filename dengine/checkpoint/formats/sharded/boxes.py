"""Blocks of tensors: which one a rank holds, and which ranks hold what of a block, if tensors are cut up evenly."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from dengine.checkpoint.formats.sharded.tree import dtype_name
from dengine.dtensor import is_dtensor, is_made_of_others, local_part

__all__ = ["Block", "Cuts", "TensorBox", "block_of", "cells_within", "check_dense", "local_box"]

# How a tensor is cut into cells, one after the other: along which dimension, into how many parts.
Cuts: TypeAlias = Sequence[tuple[int, int]]
Offsets: TypeAlias = tuple[int, ...]
Block: TypeAlias = tuple[Offsets, Offsets]  # from where on, and how large


@dataclass(frozen=True)
class TensorBox:
    """The part of a tensor that one rank holds: `sizes` elements from `offsets` on; None if it holds none of it."""

    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...] | None

    @property
    def num_elements(self) -> int:
        return 0 if self.sizes is None else math.prod(self.sizes)


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        TypeError: it is sparse, quantized, without data, made of other tensors, or has partial sums only.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(
            f"{name!r} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, but only dense tensors with "
            "data can be written: convert it by to_dense(), dequantize() or to_empty()."
        )
    if is_made_of_others(local_part(tensor)):
        raise TypeError(
            f"{name!r} is a {type(local_part(tensor)).__qualname__}, which is made of other tensors, but a folder "
            "holds plain ones: save it into a file (a path that ends with .pt)."
        )
    if is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(f"{name!r} has partial sums only ({tensor.placements}): redistribute it first.")


def local_box(name: str, tensor: torch.Tensor) -> TensorBox:
    """The part of `tensor` that this rank holds; all of it, if it is not sharded.

    Raises:
        TypeError: as `check_dense`, or it is cut into several pieces a rank.
    """
    check_dense(name, tensor)
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    if not is_dtensor(tensor):
        return TensorBox(shape, dtype, (0,) * len(shape), shape)
    if tensor.device_mesh.get_coordinate() is None:
        return TensorBox(shape, dtype, (0,) * len(shape), None)
    pieces = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # as torch.distributed.checkpoint sees it
    local = tuple(local_part(tensor).shape)
    if len(pieces) != 1 or tuple(pieces[0].sizes) != local:
        raise TypeError(
            f"{name!r} is laid out as {tensor.placements}, in which the part of this rank is not one block."
        )
    return TensorBox(shape, dtype, tuple(pieces[0].offsets), local)


def block_of(shape: Sequence[int], cuts: Cuts, cell: int) -> Block:
    """Offsets and sizes of a cell, which are counted row by row over the `cuts`: each but the last part of a cut is as
    long as the first, as torch cuts."""
    indices = []
    for _, num_parts in reversed(cuts):
        cell, index = divmod(cell, num_parts)
        indices.append(index)
    offsets, sizes = [0] * len(shape), list(shape)
    for (dim, num_parts), index in zip(cuts, reversed(indices), strict=True):
        length = -(-sizes[dim] // num_parts)
        start = min(index * length, sizes[dim])
        offsets[dim], sizes[dim] = offsets[dim] + start, min(length, sizes[dim] - start)
    return tuple(offsets), tuple(sizes)


def cells_within(shape: Sequence[int], cuts: Cuts, block: Block) -> Iterator[int]:
    """The cells that have elements of a block. Cost: one step for each of them, and each one cut above them."""

    offsets, sizes = block

    def within(cuts: Cuts, cell: int, starts: list[int], lengths: list[int]) -> Iterator[int]:
        if not cuts:
            yield cell
            return
        (dim, num_parts), *rest = cuts
        length = -(-lengths[dim] // num_parts)
        if not length:
            return
        first = max(0, offsets[dim] - starts[dim]) // length
        end = -(-(offsets[dim] + sizes[dim] - starts[dim]) // length)
        for index in range(first, min(end, -(-lengths[dim] // length))):
            inner_starts, inner = [*starts], [*lengths]
            inner_starts[dim] += index * length
            inner[dim] = min(length, lengths[dim] - index * length)
            yield from within(rest, cell * num_parts + index, inner_starts, inner)

    return within(cuts, 0, [0] * len(shape), list(shape))
