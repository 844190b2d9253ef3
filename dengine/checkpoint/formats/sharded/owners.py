"""Decide which rank writes which tensor of a folder, from the reports of all ranks. Pure: no collective.

Each rank describes its tensors in a `Structure`. Nearly all ranks have the same one, so they exchange only its digest,
and their positions in the grids (meshes) over which tensors are spread; for each digest one rank sends the structure
itself. From that each rank finds the tensors that it writes, and whether any tensor would be lost.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

from dengine.checkpoint.formats.sharded.boxes import Block, Cuts, block_of
from dengine.checkpoint.formats.sharded.report import Entry, Layout, Path, Report, Structure, digest_of_reports
from dengine.errors import CheckpointError

__all__ = ["Owners"]


class _Holder(NamedTuple):
    group: int  # the ranks with the same structure
    entry: Entry


class Owners:
    """Finds the writer of each tensor from the `reports` of all ranks, in their order, and the structures.

    Cost: time and memory for each rank's report, and for each different structure.

    Raises:
        CheckpointError: a tensor would be lost, or is incomplete; the message names it, and two ranks.
    """

    def __init__(self, reports: Sequence[Report], structures: Mapping[bytes, Structure]) -> None:
        self.reports, self.digest = tuple(reports), digest_of_reports(reports)
        ranks_of: dict[bytes, list[int]] = {}
        for rank, report in enumerate(self.reports):
            ranks_of.setdefault(report.digest, []).append(rank)
        self._ranks = list(ranks_of.values())  # the ranks of each group, in the order of its first rank
        self._structures = [structures[digest] for digest in ranks_of]
        self._group_of = {digest: group for group, digest in enumerate(ranks_of)}
        self._holders: dict[tuple[str, str], list[_Holder]] = {}
        for group, structure in enumerate(self._structures):
            for entry in structure.entries:
                self._holders.setdefault((entry.name, entry.part), []).append(_Holder(group, entry))
        self._grids: dict[tuple[tuple[int, int], ...], list[bytes]] = {}
        self._refuse_differences()

    @staticmethod
    def representatives(reports: Sequence[Report]) -> dict[bytes, int]:
        """The rank that gives the structure of each digest: the first one that has it."""
        return {report.digest: rank for rank, report in reversed([*enumerate(reports)])}

    @cached_property
    def colliding(self) -> frozenset[Path]:
        """The paths at which several parts have tensors of their own."""
        parts: dict[Path, set[str]] = {}
        for structure in self._structures:
            for path, part in structure.parts:
                parts.setdefault(path, set()).add(part)
        return frozenset(path for path, found in parts.items() if len(found) > 1)

    @cached_property
    def tellers(self) -> frozenset[int]:
        """The ranks that write the plain values and the descriptions of tensors: rank 0, and others for those it
        lacks.
        """
        known: set[object] = set()
        tellers = []
        for ranks, structure in zip(self._ranks, self._structures, strict=True):
            theirs = {(entry.name, entry.part) for entry in structure.entries}.union(structure.parts)
            if ranks[0] == 0 or not theirs <= known:
                tellers.append(ranks[0])
                known |= theirs
        return frozenset(tellers)

    def written_by(self, rank: int) -> list[str]:
        """The tensors of which `rank` writes its piece.

        All pieces of a tensor come from one copy, and copies share the work. Plain tensors come from the first rank
        that has them, as a mean from one rank would not fit a variance from another.
        """
        report = self.reports[rank]
        group = self._group_of[report.digest]
        layouts = self._structures[group].layouts
        mine = []
        for entry, writer in self._writers(group):
            if isinstance(writer, int):
                is_mine = writer == rank
            else:
                grid, place = report.grids[layouts[entry.layout].grid]
                is_mine = place >= 0 and writer == (grid, layouts[entry.layout].cell_and_copy(place)[1])
            if is_mine and entry.num_elements:
                mine.append(entry.name)
        return mine

    def blocks_of(self, rank: int) -> Iterator[tuple[str, Block]]:
        """The tensors that `rank` writes, each with what it has of it if torch has cut it evenly."""
        report = self.reports[rank]
        structure = self._structures[self._group_of[report.digest]]
        written = set(self.written_by(rank))
        for entry in structure.entries:
            if entry.name not in written:
                continue
            if entry.layout < 0:
                yield entry.name, ((0,) * len(entry.shape), entry.shape)
                continue
            layout = structure.layouts[entry.layout]
            cell, _ = layout.cell_and_copy(report.grids[layout.grid][1])
            yield entry.name, block_of(entry.shape, layout.cuts, cell)

    def reported_entries(self) -> Iterator[tuple[int, Entry, Cuts, list[int]]]:
        """Each tensor once: the rank that tells of it, how it is cut into cells, and which rank writes each of them."""
        known: set[tuple[str, str]] = set()
        ranks_of: dict[tuple[object, ...], dict[int, list[int]]] = {}  # by the number of the copy
        for group, structure in enumerate(self._structures):
            teller = self._ranks[group][0]
            for entry, writer in self._writers(group) if teller in self.tellers else ():
                if (entry.name, entry.part) in known:
                    continue
                known.add((entry.name, entry.part))
                if isinstance(writer, int):
                    yield teller, entry, (), [writer]
                    continue
                (grid, copy), layout = writer, structure.layouts[entry.layout]
                key = grid, layout.sizes, layout.cut, layout.last
                if key not in ranks_of:
                    ranks_of[key] = _by_copy(layout, self._ranks_at[grid])
                yield teller, entry, layout.cuts, ranks_of[key][copy]

    def _writers(self, group: int) -> Iterator[tuple[Entry, int | tuple[bytes, int]]]:
        """For each tensor of `group` the rank that writes it, or which copy is written, of which grid."""
        structure = self._structures[group]
        loads: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
        for entry in sorted(structure.entries):
            holders = self._holders[entry.name, entry.part]
            if entry.layout < 0:
                yield entry, self._ranks[holders[0].group][0]
                continue
            key = tuple((holder.group, holder.entry.layout) for holder in holders)
            grids, num_copies = self._grids_of(key, entry.name), structure.layouts[entry.layout].num_copies
            heap = loads.setdefault(key, [(0, copy) for copy in range(len(grids) * num_copies)])
            load, chosen = heap[0]
            heapq.heapreplace(heap, (load + entry.num_elements, chosen))
            grid, copy = divmod(chosen, num_copies)
            yield entry, (grids[grid], copy)

    @cached_property
    def _ranks_at(self) -> dict[bytes, dict[int, int]]:
        """The ranks of each grid, by their places in it."""
        ranks_at: dict[bytes, dict[int, int]] = {}
        for rank, report in enumerate(self.reports):
            for grid, place in report.grids:
                if place >= 0:
                    ranks_at.setdefault(grid, {})[place] = rank
        return ranks_at

    def _grids_of(self, key: tuple[tuple[int, int], ...], name: str) -> list[bytes]:
        """The grids that each have all of a tensor, in the order of their first ranks.

        Raises:
            CheckpointError: a rank of a grid does not have its piece.
        """
        if key not in self._grids:
            found: dict[bytes, set[int]] = {}
            for group, layout in key:
                grid = self._structures[group].layouts[layout].grid
                for rank in self._ranks[group]:
                    digest, place = self.reports[rank].grids[grid]
                    if place >= 0:
                        found.setdefault(digest, set()).add(place)
            group, layout = key[0]
            sizes: Iterable[int] = self._structures[group].layouts[layout].sizes
            size = prod(sizes)
            if any(len(each) != size for each in found.values()) or not found:
                raise CheckpointError(
                    f"The ranks' parts of {name!r} do not make up the whole: it is spread over {size} ranks, of which "
                    f"{min(map(len, found.values()), default=0)} save it."
                )
            self._grids[key] = sorted(found, key=lambda digest: min(self._ranks_at[digest].values()))
        return self._grids[key]

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
        described = self._structures[holder.group].layouts[layout]
        return f"spread as {described.placements} over {described.sizes} ranks"

    def _refuse_absent(self, name: str, holders: Sequence[_Holder]) -> None:
        """Refuse a tensor in a list that some ranks lack: an index is no name, so lists of ranks cannot be merged."""
        having = {holder.group for holder in holders}
        absent = next(ranks[0] for group, ranks in enumerate(self._ranks) if group not in having)
        texts = {absent: "not there", self._first(holders[0]): repr(holders[0].entry.kind)}
        both = " and ".join(f"{texts[rank]} on rank {rank}" for rank in sorted(texts))
        raise CheckpointError(f"All ranks must save the same tensors, but {name!r} is {both}.")


def _by_copy(layout: Layout, ranks: Mapping[int, int]) -> dict[int, list[int]]:
    """The ranks of a grid, by their places, as those of each copy in the order of its cells."""
    copies: dict[int, list[int]] = {}
    for (_, copy), rank in sorted((layout.cell_and_copy(place), rank) for place, rank in ranks.items()):
        copies.setdefault(copy, []).append(rank)
    return copies


def _pairs(holders: Sequence[_Holder]) -> Iterator[tuple[_Holder, _Holder]]:
    return ((holders[0], other) for other in holders[1:])


_WAY_OUT = (
    'If ranks have different parts of a model on purpose, say so by prepare_model(..., parts="pp"), and all parts are '
    "kept."
)
