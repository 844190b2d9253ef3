"""A mesh of ranks, on real ones; what each must have is computed here, in the parent."""

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from dengine import Engine, distributed
from dengine.distributed import mesh as mesh_module
from dengine.errors import LaunchError
from dengine.torch_internals import mesh_of_fsdp

MESHES = [
    {"dp": 2, "tp": 2},
    {"dp_replicate": 2, "dp_shard": -1},
    {"dp": 2, "cp": 2},
    {"pp": 2, "dp": 2},
]


def place_on(rank: int, size: int, mesh: dict[str, int]) -> dict[str, Any]:
    with distributed.process_group(mesh=mesh, timeout=321.0) as world:
        assert world.mesh is not None
        groups = world.mesh.get_all_groups()
        backends = [group._get_backend(torch.device("cpu")) for group in groups if group is not dist.group.WORLD]
        found = {
            "coordinates": world.coordinates,
            "data": (world.data_rank, world.data_size),
            "same": world.same_data_ranks,
            "counts": world.counts_samples,
            "sums": [summed(group, rank) for group in groups],
            "timeouts": [backend.options._timeout.total_seconds() for backend in backends],
        }
    assert not dist.is_initialized(), "the group is left open"
    assert distributed.world().mesh is None, "the mesh outlives its group"
    return found


def summed(group: Any, rank: int) -> float:
    total = torch.tensor(float(rank))
    dist.all_reduce(total, group=group)
    return total.item()


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_rank_knows_its_place_and_each_dimension_has_a_group(mesh: dict[str, int]) -> None:
    first, second = mesh
    shares = {"tp": 1, "cp": 1, "pp": 0}
    counting = {"tp": (0, 2), "cp": (0, 1, 2, 3), "pp": (2, 3)}
    shared = next((name for name in mesh if name in shares), None)
    expected = []
    for rank in range(4):
        place = divmod(rank, 2)
        peers = [
            other for other in range(4) if shared and divmod(other, 2)[1 - shares[shared]] == place[1 - shares[shared]]
        ]
        expected.append(
            {
                "coordinates": {first: place[0], second: place[1]},
                "data": (place[1 - shares[shared]], 2) if shared else (rank, 4),
                "same": tuple(peers) if shared else (rank,),
                "counts": shared is None or rank in counting[shared],
                "sums": [place[1] + place[1] + 2.0, 2.0 * place[0] + 2.0 * place[0] + 1.0],
                "timeouts": [321.0, 321.0],
            }
        )
    assert run_ranks(place_on, 4, mesh, init=False) == expected


def asks_for(rank: int, size: int, meshes: list[dict[str, int] | None]) -> str:
    try:
        with distributed.process_group(mesh=meshes[rank]):
            return "opened"
    except (LaunchError, ValueError) as error:
        assert dist.is_initialized() is False, "a group is left open"
        return f"{type(error).__name__}: {error}"


def test_ranks_with_other_meshes_are_all_told_before_a_group_is_opened() -> None:
    told = run_ranks(asks_for, 3, [{"dp": 3}, {"dp": 3}, {"tp": 3}], init=False, deadline_s=60)
    text = 'LaunchError: The ranks ask for different meshes (ranks 0, 1: mesh={"dp": 3}; rank 2: mesh={"tp": 3})'
    assert all(each.startswith(text) for each in told)


def test_a_rank_without_a_mesh_or_with_one_of_another_size_is_told_of_too() -> None:
    told = run_ranks(asks_for, 2, [{"dp": 5}, None], init=False, deadline_s=60)
    assert all('(rank 0: mesh={"dp": 5}; rank 1: none)' in each for each in told)


def test_a_mesh_of_another_size_is_refused_on_all_ranks() -> None:
    told = run_ranks(asks_for, 2, [{"dp": 5}, {"dp": 5}], init=False, deadline_s=60)
    text = 'ValueError: mesh={"dp": 5} is a mesh of 5 ranks, but there are 2.'
    assert all(each.startswith(text) for each in told)


def around_a_group(rank: int, size: int, meshes: list[dict[str, int] | None]) -> list[str]:
    found, groups = [], len(dist.distributed_c10d._world.pg_map)
    for mesh in (meshes[rank], {"dp": 2, "tp": 2}):
        try:
            with distributed.process_group(mesh=mesh) as world:
                found.append(f"{world.launcher} {world.coordinates}")
        except LaunchError as error:
            found.append(str(error))
        assert len(dist.distributed_c10d._world.pg_map) == groups, "groups of the mesh are left open"
    return found


def test_a_mesh_is_laid_over_a_group_that_is_there_and_taken_away_again() -> None:
    told = run_ranks(around_a_group, 4, [{"dp": 4}, {"dp": 4}, {"dp": 4}, None], init=True, deadline_s=60)
    refusal = (
        'The ranks ask for different meshes (ranks 0, 1, 2: mesh={"dp": 4}; rank 3: none): pass the same mesh= to '
        "process_group() on every rank."
    )
    assert told == [[refusal, f"external {{'dp': {rank // 2}, 'tp': {rank % 2}}}"] for rank in range(4)]


def inside_another(rank: int, size: int) -> list[str]:
    with distributed.process_group():
        with distributed.process_group(mesh={"dp": 1, "tp": -1}) as world, distributed.process_group() as inner:
            first = f"{world.coordinates} {inner.coordinates} {world.data_size}"
        with distributed.process_group() as inner:
            return [first, f"{inner.coordinates} {inner.data_size}"]


def test_inside_another_process_group_a_mesh_holds_for_the_block() -> None:
    told = run_ranks(inside_another, 2, init=False, deadline_s=60)
    assert told == [[f"{{'dp': 0, 'tp': {rank}}} " * 2 + "1", "{} 2"] for rank in range(2)]


def fails_while_it_is_made(rank: int, size: int) -> None:
    if rank == 1:
        vars(mesh_module)["init_device_mesh"] = lambda *args, **kwargs: 1 / 0
    with distributed.process_group(mesh={"dp": 2, "tp": 2}):
        pass


def test_a_rank_that_fails_while_the_mesh_is_made_leaves_nobody_waiting() -> None:
    outcomes = run_ranks(fails_while_it_is_made, 4, init=False, expect_failures=True, deadline_s=60)
    kinds = ["LaunchError", "ZeroDivisionError", "LaunchError", "LaunchError"]
    assert [outcome.error_type for outcome in outcomes] == kinds
    assert all(
        "lost another rank while process_group() made its mesh" in outcome.error_message
        for outcome in outcomes
        if outcome.rank != 1
    )
    assert all(outcome.seconds < 30 for outcome in outcomes)


def waits_in_a_group_of_the_mesh(rank: int, size: int) -> None:
    with distributed.process_group(mesh={"dp": 2, "tp": 2}) as world:
        if rank == 1:
            raise ValueError("bad sample 4711")
        assert world.mesh is not None
        dist.all_reduce(torch.ones(1), group=world.mesh.get_group("tp" if rank == 0 else "dp"))
        distributed.barrier("the end")


def test_who_waits_in_a_group_of_the_mesh_is_freed_by_a_failure() -> None:
    outcomes = run_ranks(waits_in_a_group_of_the_mesh, 4, init=False, expect_failures=True, deadline_s=60)
    kinds = ["RemoteRankError", "ValueError", "RemoteRankError", "RemoteRankError"]
    assert [outcome.error_type for outcome in outcomes] == kinds
    assert all(outcome.seconds < 30 for outcome in outcomes)
    told = [outcome.error_message for outcome in outcomes if outcome.rank != 1]
    assert all("Rank 1 (dp=0, tp=1) was outside of a run" in each for each in told), told


def waits_in_a_group_of_the_model(rank: int, size: int, mesh: dict[str, int], how: str) -> None:
    """Rank 1 fails in its step, while the others wait in a group that prepare_model() has made of two dimensions."""

    def step(engine: Engine, batch: Any) -> None:
        if rank == 1 and engine.state.iteration == 2:
            if how == "raises":
                raise ValueError("bad sample 4711")
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1), group=group)

    try:
        with distributed.process_group(mesh=mesh):
            group = mesh_of_fsdp(distributed.prepare_model(torch.nn.Linear(4, 4), "fsdp")).get_group()
            Engine(step).run([0] * 3)
            distributed.barrier("the end")
    except ValueError:
        time.sleep(5)  # the end of its process would free the others, too
        raise


@pytest.mark.parametrize("how", ["raises", "is killed"])
def test_who_waits_in_a_group_that_dimensions_share_is_freed_by_a_failure(how: str) -> None:
    mesh = {"pp": 2, "dp_shard": 2, "cp": 2}
    outcomes = run_ranks(waits_in_a_group_of_the_model, 8, mesh, how, init=False, expect_failures=True, deadline_s=60)
    for outcome in outcomes:
        if outcome.rank != 1:
            assert outcome.error_type == "RemoteRankError", outcome
            assert "Rank 1 (pp=0, dp_shard=0, cp=1) was" in outcome.error_message
        assert outcome.seconds < 30


def hangs(rank: int, size: int) -> None:
    with distributed.process_group(mesh={"pp": 2, "dp": 2}, stall_timeout=3):
        Engine(lambda engine, batch: time.sleep(60) if rank == 2 and engine.state.iteration == 2 else None).run([0] * 3)
        distributed.barrier("the end")


def test_who_hangs_is_told_with_its_place_on_the_mesh() -> None:
    outcomes = run_ranks(hangs, 4, init=False, expect_failures=True, deadline_s=60)
    told = [outcome.error_message + outcome.output for outcome in outcomes]
    assert all("Rank 2 (pp=1, dp=0) is at epoch 0, iteration 2" in each for each in told), told
    assert "dengine: rank 1 (pp=0, dp=1) is" in told[1]


def is_killed(rank: int, size: int) -> None:
    with distributed.process_group(mesh={"dp": 2, "tp": 2}):
        distributed.barrier("all are there")
        if rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.barrier("the end")


def test_who_vanished_is_told_with_its_place_on_the_mesh() -> None:
    outcomes = run_ranks(is_killed, 4, init=False, expect_failures=True, deadline_s=60)
    assert all("Rank 3 (dp=1, tp=1) was last seen" in outcome.error_message for outcome in outcomes[:3]), outcomes
