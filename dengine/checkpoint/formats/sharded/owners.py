"""Who writes what of a folder, from what the ranks say of themselves. Pure: no rank of its own, no collective.

Each rank says what tensors it has in a `Structure`. Nearly all ranks have the same one, so what they exchange is its
digest, and where they are in the grids (meshes) that tensors are spread over; of each digest one rank gives the
structure itself. From that each rank finds what it writes, and whether anything would be lost.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple, TypeAlias

from dengine.errors import CheckpointError

__all__ = ["Entry", "Layout", "Owners", "Report", "Structure", "digest_of", "digest_of_reports"]

Path: TypeAlias = tuple[str, ...]


class Layout(NamedTuple):
    """How tensors are spread over a grid of ranks: along a dimension that is cut, ranks have other pieces; along the
    others, copies. `grid` is its place among the grids of a report."""

    grid: int
    sizes: tuple[int, ...]
    is_cut: tuple[bool, ...]
    placements: str

    def copy_of(self, place: int) -> int:
        """Which copy the rank at `place` has, counted row by row."""
        copy = 0
        for size, is_cut, index in zip(self.sizes, self.is_cut, self._indices(place), strict=True):
            copy = copy if is_cut else copy * size + index
        return copy

    @property
    def num_copies(self) -> int:
        return prod(size for size, is_cut in zip(self.sizes, self.is_cut, strict=True) if not is_cut)

    def _indices(self, place: int) -> tuple[int, ...]:
        indices = []
        for size in reversed(self.sizes):
            place, index = divmod(place, size)
            indices.append(index)
        return tuple(reversed(indices))


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


class _Holder(NamedTuple):
    group: int  # of ranks that have one structure
    entry: Entry


def digest_of(structure: Structure) -> bytes:
    return hashlib.sha256(json.dumps(structure, separators=(",", ":")).encode()).digest()[:8]


def digest_of_reports(reports: Sequence[Report]) -> bytes:
    digest = hashlib.sha256()
    for report in reports:
        digest.update(report.digest)
        for grid, place in report.grids:
            digest.update(grid + place.to_bytes(8, "little", signed=True))
    return digest.digest()[:8]


class Owners:
    """What follows from the `reports` of all ranks, in their order, and the structure of each digest.

    Cost: time and memory for each rank's report, and for each different structure.

    Raises:
        CheckpointError: a tensor would be lost, or is not there as a whole; it is named, and so are two ranks.
    """

    def __init__(self, reports: Sequence[Report], structures: Mapping[bytes, Structure]) -> None:
        self.reports, self.digest = tuple(reports), digest_of_reports(reports)
        ranks_of: dict[bytes, list[int]] = {}
        for rank, report in enumerate(self.reports):
            ranks_of.setdefault(report.digest, []).append(rank)
        self._ranks = list(ranks_of.values())  # of each group, in the order of its first rank
        self._structures = [structures[digest] for digest in ranks_of]
        self._group_of = {digest: group for group, digest in enumerate(ranks_of)}
        self._holders: dict[tuple[str, str], list[_Holder]] = {}
        for group, structure in enumerate(self._structures):
            for entry in structure.entries:
                self._holders.setdefault((entry.name, entry.part), []).append(_Holder(group, entry))
        self._copies: dict[tuple[tuple[int, int], ...], dict[bytes, int]] = {}
        self._refuse_differences()

    @staticmethod
    def representatives(reports: Sequence[Report]) -> dict[bytes, int]:
        """The rank that gives the structure of each digest: the first one that has it."""
        return {report.digest: rank for rank, report in reversed([*enumerate(reports)])}

    @cached_property
    def colliding(self) -> frozenset[Path]:
        """The paths that are in several parts, each of which has a tensor of its own there."""
        parts: dict[Path, set[str]] = {}
        for structure in self._structures:
            for path, part in structure.parts:
                parts.setdefault(path, set()).add(part)
        return frozenset(path for path, found in parts.items() if len(found) > 1)

    @cached_property
    def tellers(self) -> frozenset[int]:
        """The ranks that say what is no tensor, and what the tensors are: rank 0, and others for what it lacks."""
        known: set[object] = set()
        tellers = []
        for ranks, structure in zip(self._ranks, self._structures, strict=True):
            theirs = {(entry.name, entry.part) for entry in structure.entries}.union(structure.parts)
            if ranks[0] == 0 or not theirs <= known:
                tellers.append(ranks[0])
                known |= theirs
        return frozenset(tellers)

    def written_by(self, rank: int) -> list[str]:
        """The tensors of which `rank` writes its piece. All pieces of one are from one copy, and copies share the work;
        of plain tensors those of the first rank that has them count, as a mean from one rank would not go with a
        variance from another."""
        report = self.reports[rank]
        group = self._group_of[report.digest]
        structure = self._structures[group]
        loads: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
        written = []
        for entry in sorted(structure.entries):
            holders = self._holders[entry.name, entry.part]
            if entry.layout < 0:
                is_mine = rank == self._ranks[holders[0].group][0]
            else:
                key = tuple((holder.group, holder.entry.layout) for holder in holders)
                copies, layout = self._copies_of(key, entry.name), structure.layouts[entry.layout]
                heap = loads.setdefault(key, [(0, copy) for copy in range(len(copies) * layout.num_copies)])
                load, chosen = heap[0]
                heapq.heapreplace(heap, (load + entry.num_elements, chosen))
                grid, place = report.grids[layout.grid]
                is_mine = place >= 0 and chosen == copies[grid] * layout.num_copies + layout.copy_of(place)
            if is_mine and entry.num_elements:
                written.append(entry.name)
        return written

    def _copies_of(self, key: tuple[tuple[int, int], ...], name: str) -> dict[bytes, int]:
        """The grids that each hold all of a tensor, in the order of their first ranks.

        Raises:
            CheckpointError: a rank of a grid is not among those that have it.
        """
        if key not in self._copies:
            found_at: dict[bytes, set[int]] = {}
            for group, layout in key:
                grid = self._structures[group].layouts[layout].grid
                for rank in self._ranks[group]:
                    digest, place = self.reports[rank].grids[grid]
                    if place >= 0:
                        found_at.setdefault(digest, set()).add(place)
            group, layout = key[0]
            size = prod(self._structures[group].layouts[layout].sizes)
            if any(len(found) != size for found in found_at.values()) or not found_at:
                raise CheckpointError(
                    f"The ranks' parts of {name!r} do not make up the whole: it is spread over {size} ranks, of which "
                    f"{min(map(len, found_at.values()), default=0)} save it."
                )
            firsts = self._first_ranks()
            self._copies[key] = {
                digest: copy for copy, digest in enumerate(sorted(found_at, key=lambda each: firsts[each]))
            }
        return self._copies[key]

    def _first_ranks(self) -> dict[bytes, int]:
        return {digest: rank for rank, each in reversed([*enumerate(self.reports)]) for digest, _ in each.grids}

    def _refuse_differences(self) -> None:
        parts: dict[str, _Holder] = {}
        for (name, part), holders in self._holders.items():
            for first, other in _pairs(holders):
                if self._described(first) != self._described(other):
                    self._refuse(name, first, other)
            other = parts.setdefault(name, holders[0])
            if (other.entry.part == "") != (part == ""):
                declared, plain = (other, holders[0]) if part == "" else (holders[0], other)
                raise CheckpointError(
                    f"All ranks must save the same tensors, but {name!r} is a part of its own "
                    f"({declared.entry.part}) on rank {self._first(declared)}, and not declared to be one on rank "
                    f"{self._first(plain)}. {_WAY_OUT}"
                )
            if part == "" and name.rpartition("/")[2].isdigit() and len(holders) < len(self._ranks):
                self._refuse_absent(name, holders)

    def _described(self, holder: _Holder) -> object:
        layout = holder.entry.layout
        spread = () if layout < 0 else self._structures[holder.group].layouts[layout][1:]
        return holder.entry.kind, spread

    def _first(self, holder: _Holder) -> int:
        return self._ranks[holder.group][0]

    def _refuse(self, name: str, first: _Holder, other: _Holder) -> None:
        one, two = first.entry.kind, other.entry.kind
        texts = [repr(one), repr(two)] if one != two else [self._spread(first), self._spread(other)]
        raise CheckpointError(
            f"All ranks must save the same tensors, but {name!r} is {texts[0]} on rank {self._first(first)} and "
            f"{texts[1]} on rank {self._first(other)}. {_WAY_OUT}"
        )

    def _spread(self, holder: _Holder) -> str:
        layout = holder.entry.layout
        if layout < 0:
            return "not spread over ranks"
        _, sizes, _, placements = self._structures[holder.group].layouts[layout]
        return f"spread as {placements} over {sizes} ranks"

    def _refuse_absent(self, name: str, holders: Sequence[_Holder]) -> None:
        """A place in a list is no name: the lists of two ranks do not make up one."""
        having = {holder.group for holder in holders}
        absent = next(ranks[0] for group, ranks in enumerate(self._ranks) if group not in having)
        texts = {absent: "not there", self._first(holders[0]): repr(holders[0].entry.kind)}
        both = " and ".join(f"{texts[rank]} on rank {rank}" for rank in sorted(texts))
        raise CheckpointError(f"All ranks must save the same tensors, but {name!r} is {both}.")


def _pairs(holders: Sequence[_Holder]) -> Iterator[tuple[_Holder, _Holder]]:
    return ((holders[0], other) for other in holders[1:])


_WAY_OUT = (
    'If ranks have different parts of a model on purpose, say so by prepare_model(..., parts="pp"), and all parts are '
    "kept."
)
