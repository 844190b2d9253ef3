"""Which rank has written what of each tensor: what a reader needs to know before it reads a rank's document. Pure.

A tensor is named by 8 bytes of its name's digest; how it is cut, and which ranks have the cells, is said once for all
tensors that are laid out alike.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

from dengine.checkpoint.formats.sharded.boxes import Block, Cuts, cells_within
from dengine.checkpoint.formats.sharded.owners import Owners
from dengine.checkpoint.formats.sharded.report import Entry, Path

__all__ = ["Index", "index_of", "kept_name"]


def index_of(
    owners: Owners, irregular: Collection[str] = (), mesh_sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The index as JSON. `irregular` are tensors that are cut otherwise than torch cuts evenly; `mesh_sizes` are the
    sizes of the world's mesh, which readers need if names of several parts collide.

    Cost: time for each tensor, and for each rank of each layout.
    """
    layouts: list[dict[str, Any]] = []
    numbers: dict[object, int] = {}
    tensors: dict[str, dict[str, Any]] = {str(teller): {} for teller in sorted(owners.tellers)}
    for teller, entry, cuts, ranks in owners.reported_entries():
        where: object = ranks
        if cuts:
            even = None if entry.name in irregular else cuts
            key = even, id(ranks)  # one list for all tensors that are laid out alike
            if key not in numbers:
                numbers[key] = len(layouts)
                layouts.append({"cuts": even and [list(cut) for cut in even], "ranks": list(_runs(ranks))})
            where = numbers[key]
        tensors[str(teller)][_digest(kept_name(entry, owners.colliding))] = where
    mesh = {"mesh": dict(mesh_sizes)} if owners.colliding and mesh_sizes else {}
    return {"layouts": layouts, "tensors": tensors, **mesh}


def kept_name(entry: Entry, colliding: Collection[Path]) -> str:
    """The name of a tensor in the folder: with its part, if other parts have the name too."""
    start = entry.name
    while entry.part and start and colliding:
        path = tuple(start.split("/"))
        if path in colliding:
            return "/".join((*path[:-1], entry.part, path[-1])) + entry.name[len(start) :]
        start = start.rpartition("/")[0]
    return entry.name


class Index:
    """What `index_of` gave, read again.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it was made up.
    """

    def __init__(self, values: Mapping[str, Any], num_ranks: int) -> None:
        self.by_teller = {_rank(int(teller), num_ranks): names for teller, names in values["tensors"].items()}
        self._num_ranks = num_ranks
        self._layouts = [self._layout(each) for each in values["layouts"]]
        # None in folders of earlier versions
        self.mesh_sizes = {str(name): int(size) for name, size in values["mesh"].items()} if "mesh" in values else None

    def tellers_of(self, names: Iterable[str]) -> list[int]:
        """The ranks that tell of one of `names`, which begin with the path of what has a part."""
        digests = set(map(_digest, names))
        return [teller for teller, known in self.by_teller.items() if not digests.isdisjoint(known)]

    def ranks_of(self, name: str, shape: Sequence[int], block: Block) -> list[int] | None:
        """The ranks that have written something of a block of a tensor; None if the index does not know it."""
        where: object = self._where.get(_digest(name))
        if where is None:
            return None
        if isinstance(where, list):
            return [_rank(rank, self._num_ranks) for rank in where]
        if type(where) is not int or not 0 <= where < len(self._layouts):
            raise ValueError(f"{str(where)[:80]} is no layout")
        cuts, ranks = self._layouts[where]
        if cuts is None:
            return ranks
        if any(dim >= len(shape) for dim, _ in cuts):
            raise ValueError(f"{name!r} is cut along a dimension that it has not")
        return sorted({ranks[cell] for cell in cells_within(shape, cuts, block)})

    @cached_property
    def _where(self) -> dict[str, Any]:
        return {digest: where for names in self.by_teller.values() for digest, where in names.items()}

    def _layout(self, values: Mapping[str, Any]) -> tuple[Cuts | None, list[int]]:
        if sum(count for _, _, count in values["ranks"]) > self._num_ranks:
            raise ValueError("a layout has more ranks than there were")
        ranks = [
            _rank(start + step * each, self._num_ranks)
            for start, step, count in values["ranks"]
            for each in range(count)
        ]
        cuts = values["cuts"]
        if cuts is None:
            return None, ranks
        checked = [(int(dim), int(num_parts)) for dim, num_parts in cuts]
        if any(dim < 0 or num_parts < 1 for dim, num_parts in checked) or prod(num for _, num in checked) != len(ranks):
            raise ValueError("a layout is cut into other cells than it has ranks")
        return checked, ranks


def _rank(rank: int, num_ranks: int) -> int:
    if type(rank) is not int or not 0 <= rank < num_ranks:
        raise ValueError(f"{str(rank)[:80]} is none of {num_ranks} ranks")
    return rank


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _runs(ranks: Sequence[int]) -> Iterator[list[int]]:
    """`ranks` as [first, step, count] each."""
    start = 0
    while start < len(ranks):
        end, step = start + 1, 1
        if end < len(ranks):
            step = ranks[end] - ranks[start]
            while end < len(ranks) and ranks[end] - ranks[end - 1] == step:
                end += 1
        yield [ranks[start], step, end - start]
        start = end
