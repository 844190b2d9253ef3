"""The mesh of `process_group(mesh=)`: what is refused, and what a rank learns about its place."""

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dengine import distributed
from dengine.distributed import World
from dengine.launch.mesh import checked_sizes, filled_sizes, other_meshes_text

NAMES = "data: dp, dp_replicate, dp_shard, ep; sequence: cp; model: tp, pp"


@pytest.fixture
def no_group_left() -> Iterator[None]:
    yield
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("mesh", "error", "text"),
    [
        ({"data": 2, "tp": 2}, ValueError, f"a dimension 'data', but the names are {NAMES}"),
        ({"dp": -1, "tp": -1}, ValueError, "leaves 2 sizes open (dp, tp), but only one can be -1"),
        ({}, ValueError, "has no dimension"),
        ({"dp": 0}, ValueError, "mesh['dp']=0 must be at least 1"),
        ({"dp": 2.0}, TypeError, "mesh['dp']=2.0 must be a whole number"),
        ({"dp": True}, TypeError, "mesh['dp']=True must be a whole number"),
        ("dp=2", TypeError, "takes the sizes of its dimensions by name"),
        ([2, 2], TypeError, "takes the sizes of its dimensions by name"),
        ({"dp": 2, "tp": 2}, ValueError, "of 2 x 2 = 4 ranks, but there are 1"),
    ],
)
@pytest.mark.usefixtures("no_group_left")
def test_a_mesh_that_is_none_is_refused_and_nothing_is_opened(mesh: Any, error: type, text: str) -> None:
    with pytest.raises(error) as caught, distributed.process_group(mesh=mesh):
        pass
    assert text in str(caught.value)
    assert distributed.world().mesh is None


@pytest.mark.usefixtures("no_group_left")
def test_a_world_of_one_by_choice_has_no_mesh() -> None:
    refused = pytest.raises(ValueError, match="world of one, which has no mesh")
    with refused, distributed.process_group("none", mesh={"dp": 1}):
        pass


def test_a_command_line_can_say_the_sizes() -> None:
    assert distributed.mesh_sizes("dp_shard=-1, tp=2") == {"dp_shard": -1, "tp": 2}
    for text, words in (
        ("tp", "mesh=tp must be sizes by name"),
        ("tp=2,tp=2", "with each name once"),
        ("tp=²", "must be sizes by name"),
        ("tp=0", "must be at least 1"),
        ("x=2", "a dimension 'x'"),
        ("dp=-1,tp=-1", "leaves 2 sizes open"),
    ):
        with pytest.raises(ValueError, match=words):
            distributed.mesh_sizes(text)


def test_one_open_size_takes_what_the_others_leave() -> None:
    assert filled_sizes({"dp_replicate": 2, "dp_shard": -1, "tp": 2}, 16) == {"dp_replicate": 2, "dp_shard": 4, "tp": 2}
    assert filled_sizes({"tp": 2, "dp": -1}, 2) == {"tp": 2, "dp": 1}


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "text"),
    [
        ({"dp": 3, "tp": 2}, 8, "3 x 2 = 6 ranks, but there are 8. What fits, with the other sizes as they are: dp=4."),
        (
            {"dp": 2, "tp": 2},
            8,
            "2 x 2 = 4 ranks, but there are 8. What fits, with the other sizes as they are: dp=4, tp=4",
        ),
        ({"dp": 3, "tp": 5}, 8, "their product must be 8"),
        ({"dp": 4}, 6, "4 ranks, but there are 6. What fits, with the other sizes as they are: dp=6."),
        (
            {"dp": -1, "tp": 3},
            8,
            "3 ranks to each place along dp, which does not divide the 8 there are. What fits, with the "
            "other sizes as they are: tp=1 or 2 or 4 or 8.",
        ),
    ],
)
def test_a_product_that_is_not_the_number_of_ranks_names_both_and_what_fits(
    sizes: dict[str, int], num_ranks: int, text: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        filled_sizes(checked_sizes(sizes), num_ranks)


def test_ranks_with_other_meshes_are_told_apart() -> None:
    assert other_meshes_text(['{"dp": 2}'] * 3) == ""
    text = other_meshes_text(['{"dp": 4}', '{"dp": 4}', '{"dp": 2, "tp": 2}', ""])
    assert '(ranks 0, 1: mesh={"dp": 4}; rank 2: mesh={"dp": 2, "tp": 2}; rank 3: none)' in text


@pytest.mark.usefixtures("no_group_left")
def test_plain_python_has_a_mesh_of_one_on_which_tensors_can_lie() -> None:
    with distributed.process_group(mesh={"dp_shard": -1, "tp": 1}) as world:
        assert (world.size, world.launcher, world.data_rank, world.data_size) == (1, "single", 0, 1)
        assert isinstance(world.mesh, DeviceMesh)
        assert (world.mesh.mesh_dim_names, world.mesh.shape) == (("dp_shard", "tp"), (1, 1))
        assert world.coordinates == {"dp_shard": 0, "tp": 0}
        assert distributed.world() is world
        with distributed.process_group() as inner:  # a library's own
            assert inner.coordinates == world.coordinates
        spread = distribute_tensor(torch.arange(4.0), world.mesh["tp"], [Shard(0)])
        assert isinstance(spread, DTensor)
        assert spread.full_tensor().tolist() == [0, 1, 2, 3]
    with distributed.process_group() as world:
        assert world.mesh is None


@pytest.mark.usefixtures("no_group_left")
def test_a_failure_inside_destroys_the_group_of_one() -> None:
    with pytest.raises(KeyError), distributed.process_group(mesh={"dp": 1}):
        raise KeyError


def test_without_a_mesh_every_rank_has_data_of_its_own() -> None:
    here = World(rank=3, size=4)
    assert (here.mesh, here.coordinates, here.data_rank, here.data_size) == (None, {}, 3, 4)
    assert (here.same_data_ranks, here.has_last_stage, here.counts_samples) == ((3,), True, True)


@pytest.mark.parametrize(
    "sizes",
    [
        {"dp": 2, "tp": 2},
        {"tp": 2, "dp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp": 2, "cp": 2},
        {"pp": 2, "dp": 2},
        {"pp": 2, "dp_replicate": 2, "dp_shard": 3, "cp": 2, "tp": 2},
        {"dp_shard": 2, "ep": 2, "tp": 3},
        {"tp": 4},
    ],
)
def test_every_rank_of_any_mesh_knows_its_part_of_the_data(sizes: dict[str, int]) -> None:
    """On torch's fake backend, one rank after the other. The places are counted here by hand."""
    places = [dict(zip(sizes, place, strict=True)) for place in product(*map(range, sizes.values()))]
    parts = [tuple(place for name, place in each.items() if name not in ("cp", "tp", "pp")) for each in places]
    known = sorted(set(parts))
    for rank, place in enumerate(places):
        here = fake_world(rank, sizes)
        assert here.coordinates == place
        assert (here.data_rank, here.data_size) == (known.index(parts[rank]), len(known))
        assert here.same_data_ranks == tuple(other for other, part in enumerate(parts) if part == parts[rank])
        assert here.has_last_stage == (place.get("pp", 0) == sizes.get("pp", 1) - 1)
        assert here.counts_samples == (here.has_last_stage and place.get("tp", 0) == 0)


def test_a_mesh_of_ones_own_may_number_its_ranks_otherwise() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("dp", "tp"))
        with distributed.process_group(mesh=mesh) as here:
            assert here.mesh is mesh
            assert (here.data_rank, here.same_data_ranks, here.counts_samples) == (1, (1, 3), True)
            with distributed.process_group() as inner:
                assert inner.data_size == 2
        for bad, text in (
            (init_device_mesh("cpu", (4,)), "without names"),
            (init_device_mesh("cpu", (4,), mesh_dim_names=("x",)), "a dimension 'x'"),
            (mesh["dp"], "of 2 ranks, but there are 4"),
        ):
            with pytest.raises(ValueError, match=text), distributed.process_group(mesh=bad):
                pass
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="no process group"), distributed.process_group(mesh=mesh):
        pass


def fake_world(rank: int, sizes: dict[str, int]) -> World:
    size = torch.Size(sizes.values()).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        return World(rank=rank, size=size, mesh=init_device_mesh("cpu", (*sizes.values(),), mesh_dim_names=(*sizes,)))
    finally:
        dist.destroy_process_group()
