"""What ranks say of their tensors to each other. Pure."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

__all__ = ["Entry", "Layout", "Path", "Report", "Structure", "digest_of", "digest_of_reports"]

Path: TypeAlias = tuple[str, ...]


class Layout(NamedTuple):
    """How tensors are spread over a grid of ranks: along a dimension that is cut, ranks have other pieces; along the
    others, copies. `grid` is its place among the grids of a report; `cut` has, for each dimension of the grid, that of
    the tensors, or None; `last` are those whose cut comes after the others (FSDP's, of what `tp` has cut)."""

    grid: int
    sizes: tuple[int, ...]
    cut: tuple[int | None, ...]
    last: tuple[int, ...]
    placements: str

    @property
    def _order(self) -> list[int]:
        """The dimensions that are cut, in the order of the cuts."""
        cut = [axis for axis, dim in enumerate(self.cut) if dim is not None]
        return [axis for axis in cut if axis not in self.last] + [axis for axis in cut if axis in self.last]

    @property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        return tuple((dim, self.sizes[axis]) for axis in self._order if (dim := self.cut[axis]) is not None)

    @property
    def num_copies(self) -> int:
        return prod(size for size, dim in zip(self.sizes, self.cut, strict=True) if dim is None)

    def cell_and_copy(self, place: int) -> tuple[int, int]:
        """Which cell the rank at `place` has, and in which copy; both are counted row by row."""
        indices = []
        for size in reversed(self.sizes):
            place, index = divmod(place, size)
            indices.append(index)
        indices.reverse()
        cell = copy = 0
        for axis in self._order:
            cell = cell * self.sizes[axis] + indices[axis]
        for axis, dim in enumerate(self.cut):
            copy = copy if dim is not None else copy * self.sizes[axis] + indices[axis]
        return cell, copy


class Entry(NamedTuple):
    """A tensor that a rank has at least a piece of. `part` is which part of a model it is, if ranks have different ones
    ("pp=1"), else ""; `layout` is its place among those of the structure, -1 if the tensor is a plain one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: str
    layout: int

    @property
    def num_elements(self) -> int:
        sizes: Iterable[int] = self.shape
        return prod(sizes)

    @property
    def kind(self) -> tuple[tuple[int, ...], str]:
        return self.shape, self.dtype


class Structure(NamedTuple):
    """What a rank has to save; `parts` has the part of each name, by its path, whether or not a tensor is there yet."""

    entries: tuple[Entry, ...]
    layouts: tuple[Layout, ...]
    parts: tuple[tuple[Path, str], ...]


class Report(NamedTuple):
    """What a rank says at each save: the digest of its structure and, for each of its grids, a digest of the ranks in
    it, and this rank's place there (-1 if it has none)."""

    digest: bytes
    grids: tuple[tuple[bytes, int], ...] = ()


def digest_of(structure: Structure) -> bytes:
    return hashlib.sha256(json.dumps(structure, separators=(",", ":")).encode()).digest()[:8]


def digest_of_reports(reports: Sequence[Report]) -> bytes:
    digest = hashlib.sha256()
    for report in reports:
        digest.update(report.digest)
        for grid, place in report.grids:
            digest.update(grid + place.to_bytes(8, "little", signed=True))
    return digest.digest()[:8]
