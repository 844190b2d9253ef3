"""Who writes what of a folder, and where a reader looks for it: for any number of ranks, without any of them."""

import itertools
import json
from collections import Counter
from math import prod

import pytest

from dengine.checkpoint.formats.sharded.boxes import block_of, cells_within
from dengine.checkpoint.formats.sharded.index import Index, index_of, kept_name
from dengine.checkpoint.formats.sharded.owners import Owners
from dengine.checkpoint.formats.sharded.report import Entry, Layout, Report, Structure, digest_of
from dengine.errors import CheckpointError

SHAPES = [(7, 5), (16,), (3, 4, 2), (1, 9)]
Block = tuple[tuple[int, ...], tuple[int, ...]]


def world_of(
    layout: Layout, grids: list[list[int]], num_ranks: int, part_of: dict[int, str] | None = None
) -> tuple[Owners, list[Structure]]:
    """Ranks with `layout` over each of `grids`, lists of ranks by place, and a plain tensor each."""
    dims = max([dim for dim in layout.cut if dim is not None], default=0)
    reports, structures, of_ranks = [], {}, []
    for rank in range(num_ranks):
        part = (part_of or {}).get(rank, "")
        entries = [
            Entry(f"model/w{number}", shape, "float32", part, 0)
            for number, shape in enumerate(SHAPES * 3)
            if len(shape) > dims
        ]
        entries.append(Entry("model/plain", (3,), "float32", part, -1))
        parts = tuple((tuple(entry.name.split("/")), part) for entry in entries if part)
        structure = Structure(tuple(entries), (layout,), parts)
        number, grid = next(each for each in enumerate(grids) if rank in each[1])
        structures[digest_of(structure)] = structure
        of_ranks.append(structure)
        reports.append(Report(digest_of(structure), ((bytes([number]) * 8, grid.index(rank)),)))
    return Owners(reports, structures), of_ranks


def elements(block: Block) -> set[tuple[int, ...]]:
    ranges = [range(offset, offset + size) for offset, size in zip(*block, strict=True)]
    return set(itertools.product(*ranges))


LAYOUTS = {
    "fsdp": (Layout(0, (6,), (0,), (), ""), [[*range(6)]], 6),
    "hsdp": (Layout(0, (2, 3), (None, 0), (), ""), [[*range(6)]], 6),
    "replicated": (Layout(0, (4,), (None,), (), ""), [[*range(4)]], 4),
    "tp beside dp": (Layout(0, (2,), (1,), (), ""), [[0, 1], [2, 3], [4, 5]], 6),
    "dp outside": (Layout(0, (2,), (0,), (), ""), [[0, 3], [1, 4], [2, 5]], 6),
    "tiles": (Layout(0, (2, 3), (0, 1), (), ""), [[*range(6)]], 6),
    "strided": (Layout(0, (3, 2), (0, 0), (0,), ""), [[*range(6)]], 6),
    "three": (Layout(0, (2, 2, 2), (0, None, 0), (), ""), [[*range(8)]], 8),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_element_is_written_once_from_one_copy_and_found_where_it_is(name: str) -> None:
    layout, grids, num_ranks = LAYOUTS[name]
    owners, structures = world_of(layout, grids, num_ranks)
    index = Index(json.loads(json.dumps(index_of(owners))), num_ranks)
    written: dict[str, dict[int, Block]] = {}
    for rank in range(num_ranks):
        for tensor, block in owners.blocks_of(rank):
            written.setdefault(tensor, {})[rank] = block
    assert sorted(written) == sorted(entry.name for entry in structures[0].entries)
    writers = Counter(rank for blocks in written.values() for rank in blocks)
    for entry in structures[0].entries:
        blocks = written[entry.name]
        found = Counter(element for block in blocks.values() for element in elements(block))
        assert set(found.values()) == {1}
        assert len(found) == prod(entry.shape)
        if entry.layout >= 0:
            copies = {
                (number, layout.cell_and_copy(grid.index(rank))[1])
                for rank in blocks
                for number, grid in enumerate(grids)
                if rank in grid
            }
            assert len(copies) == 1, "a mixture of replicas"
        ends = [range(size) for size in entry.shape]
        for corner in itertools.product(*ends):
            asked: Block = (corner, tuple(min(2, size - at) for size, at in zip(entry.shape, corner, strict=True)))
            having = {rank for rank, block in blocks.items() if elements(block) & elements(asked)}
            assert set(index.ranks_of(entry.name, entry.shape, asked) or ()) == having
    assert len(writers) == num_ranks, "one copy does all the work"
    assert index.ranks_of("model/other", (2,), ((0,), (2,))) is None


@pytest.mark.parametrize("shape", [(7, 5), (12, 3), (1, 1), (0, 4)])
@pytest.mark.parametrize("cuts", [[(0, 3)], [(1, 4)], [(0, 2), (1, 3)], [(0, 2), (0, 3)], [(1, 2), (0, 5), (1, 2)], []])
def test_cells_within_a_block_are_those_that_meet_it(shape: tuple[int, int], cuts: list[tuple[int, int]]) -> None:
    cells = {cell: elements(block_of(shape, cuts, cell)) for cell in range(prod(num for _, num in cuts))}
    assert sum(map(len, cells.values())) == prod(shape)
    for start in itertools.product(*map(range, shape)):
        for size in itertools.product(*(range(1, end - at + 1) for end, at in zip(shape, start, strict=True))):
            asked = elements((start, size))
            assert set(cells_within(shape, cuts, (start, size))) == {
                cell for cell, block in cells.items() if block & asked
            }


def test_parts_are_told_and_kept_apart_where_their_names_collide() -> None:
    layout = Layout(0, (2,), (0,), (), "")
    parts = {0: "pp=0", 1: "pp=0", 2: "pp=1", 3: "pp=1"}
    owners, structures = world_of(layout, [[0, 1], [2, 3]], 4, parts)
    assert owners.tellers == {0, 2}
    assert {kept_name(entry, owners.colliding) for entry in structures[2].entries} >= {
        "model/pp=1/w0",
        "model/pp=1/plain",
    }
    index = Index(index_of(owners), 4)
    assert index.ranks_of("model/pp=1/w1", (16,), ((9,), (1,))) == [3]
    assert index.ranks_of("model/pp=0/plain", (3,), ((0,), (3,))) == [0]
    assert index.ranks_of("model/w1", (16,), ((0,), (16,))) is None
    assert index.tellers_of(["model/pp=1/w0"]) == [2]


def test_a_replica_of_which_a_rank_is_missing_is_named() -> None:
    entry = Entry("model/w", (4,), "float32", "", 0)
    structure = Structure((entry,), (Layout(0, (3,), (0,), (), ""),), ())
    digest = digest_of(structure)
    owners = Owners([Report(digest, ((b"g" * 8, place),)) for place in (0, 2)], {digest: structure})
    with pytest.raises(
        CheckpointError, match=r"'model/w' do not make up the whole: it is spread over 3 ranks, of which 2"
    ):
        owners.written_by(0)


@pytest.mark.parametrize("num_ranks", [64, 1024])
def test_the_root_has_little_for_each_tensor_whatever_the_number_of_ranks(num_ranks: int) -> None:
    layout = Layout(0, (num_ranks // 32, 32), (None, 0), (), "")
    entries = tuple(Entry(f"model/layer{number}.weight", (4096, 512), "bfloat16", "", 0) for number in range(900))
    structure = Structure(entries, (layout,), ())
    digest = digest_of(structure)
    owners = Owners([Report(digest, ((b"g" * 8, rank),)) for rank in range(num_ranks)], {digest: structure})
    text = json.dumps(index_of(owners), separators=(",", ":"))
    assert len(text) < 32 * len(entries) + 64 * num_ranks // 32
    shares = [len(owners.written_by(rank)) for rank in (0, num_ranks // 2, num_ranks - 1)]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layouts": [{"cuts": [[0, 2]], "ranks": [[0, 1, 10**12]]}]}, "more ranks than there were"),
        ({"layouts": [{"cuts": [[0, 2]], "ranks": [[0, 9, 2]]}]}, "9 is none of 2 ranks"),
        ({"layouts": [{"cuts": [[0, 3]], "ranks": [[0, 1, 2]]}]}, "other cells than it has ranks"),
        ({"layouts": [{"cuts": [[-1, 2]], "ranks": [[0, 1, 2]]}]}, "other cells"),
        ({"tensors": {"7": {}}}, "7 is none of 2 ranks"),
    ],
)  # fmt: skip
def test_an_index_that_somebody_made_up_is_refused(change: dict[str, object], message: str) -> None:
    good = {"layouts": [{"cuts": [[0, 2]], "ranks": [[0, 1, 2]]}], "tensors": {"0": {}}}
    Index(good, 2)
    with pytest.raises(ValueError, match=message):
        Index({**good, **change}, 2)
