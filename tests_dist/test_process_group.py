"""Joining, talking and leaving, on real ranks; expected values are computed here, in the parent."""

import gc
import importlib
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, own_store, run_python, run_ranks, torchrun
from torch.utils.data import DataLoader

from dengine import Engine, Events, distributed, torch_internals
from dengine.control.watchdog import Watchdog
from dengine.errors import RankZeroCollectiveError, RemoteRankError


def world_of(rank: int, size: int) -> dict[str, Any]:
    with distributed.process_group(timeout=300) as world:
        assert distributed.world() is world
        return {
            name: getattr(world, name)
            for name in ("rank", "size", "local_rank", "local_size", "node_rank", "launcher", "backend")
        }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_knows_its_place(size: int) -> None:
    expected = {"size": size, "local_size": size, "node_rank": 0, "launcher": "torchrun", "backend": "gloo"}
    assert run_ranks(world_of, size, init=False) == [
        {"rank": rank, "local_rank": rank, **expected} for rank in range(size)
    ]


def started_by_srun(rank: int, size: int, port: int) -> None:
    """Put SLURM's variables in the place of torchrun's."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    # No agent hosts a store under SLURM: rank 0 does.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ |= {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(size),
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": "77",
        "MASTER_PORT": str(port),
    }


def slurm_world(rank: int, size: int, port: int) -> tuple[int, int, str, float]:
    started_by_srun(rank, size, port)
    with distributed.process_group(timeout=300) as world:
        return world.rank, world.size, world.launcher, distributed.all_reduce(float(rank))


def test_slurms_variables_are_enough() -> None:
    found = run_ranks(slurm_world, 3, free_port(), init=False)
    assert found == [(rank, 3, "slurm", 3.0) for rank in range(3)]


def mesh_under_slurm(rank: int, size: int, port: int) -> tuple[str, dict[str, int], list[int], torch.Tensor]:
    started_by_srun(rank, size, port)
    with distributed.process_group(mesh={"dp": -1, "tp": 2}, timeout=300) as world:
        torch.manual_seed(rank)
        model = distributed.prepare_model(torch.nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data: Any = range(8)
        loader = distributed.prepare_data_loader(DataLoader(data, batch_size=2), exact=True)
        seen: list[int] = []

        def step(engine: Engine, batch: torch.Tensor) -> None:
            seen.extend(batch.tolist())
            model(batch[:, None].expand(-1, 2).float()).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        Engine(step).run(loader)
        return (
            world.launcher,
            world.coordinates,
            seen,
            torch.cat([each.detach().flatten() for each in model.parameters()]),
        )


def test_the_same_mesh_is_laid_over_the_ranks_of_srun() -> None:
    found = run_ranks(mesh_under_slurm, 4, free_port(), init=False)
    for rank, (launcher, coordinates, seen, weights) in enumerate(found):
        assert (launcher, coordinates) == ("slurm", {"dp": rank // 2, "tp": rank % 2})
        assert seen == found[rank // 2 * 2][2]
        assert weights.equal(found[0][3])
    assert sorted(found[0][2] + found[2][2]) == list(range(8))


def external_world(rank: int, size: int) -> tuple[bool, str, int]:
    with distributed.process_group() as world:
        pass
    return dist.is_initialized(), world.launcher, distributed.world().size


def test_a_group_that_was_there_is_used_and_left_alone() -> None:
    assert run_ranks(external_world, 2, init=True) == [(True, "external", 2)] * 2


def fails_in_a_group_that_was_there(rank: int, size: int, folder: Path) -> str:
    """The others wait in the user's own group for a rank that has failed, handles it, and takes its time to leave."""

    def step(engine: Engine, batch: int) -> None:
        if rank == 1 and batch == 3:
            raise ValueError("bad sample 4711")
        dist.all_reduce(torch.ones(1))

    def freed() -> bool:
        return len(list(folder.iterdir())) == size - 1

    with distributed.process_group(stall_timeout=600):
        try:
            Engine(step).run(range(10))
        except (ValueError, RemoteRankError) as error:
            end = time.monotonic() + 60  # the group itself gives them up after 100 s
            while rank == 1 and not freed() and time.monotonic() < end:
                time.sleep(0.05)
            if rank != 1:
                (folder / str(rank)).touch()
            raise RuntimeError(f"{type(error).__name__}, others freed: {rank != 1 or freed()}") from error
    return "left"


def test_ranks_that_wait_in_a_group_that_was_there_are_freed_too(tmp_path: Path) -> None:
    outcomes = run_ranks(fails_in_a_group_that_was_there, 3, tmp_path, init=True, expect_failures=True, deadline_s=40)
    kinds = ["RemoteRankError", "ValueError", "RemoteRankError"]
    assert [outcome.error_message for outcome in outcomes] == [f"{kind}, others freed: True" for kind in kinds]


def twice(rank: int, size: int) -> list[float]:
    sums = []
    for _ in range(3):
        with distributed.process_group(timeout=300):
            sums.append(distributed.all_reduce(float(rank)))
        assert not dist.is_initialized()
    return sums


def test_it_can_be_entered_again() -> None:
    assert run_ranks(twice, 2, init=False) == [[1.0] * 3] * 2


def threads_after_the_block(rank: int, size: int) -> list[str]:
    watch_host = Watchdog._watch_host

    def ends_late(watchdog: Watchdog) -> None:
        watch_host(watchdog)
        time.sleep(0.5)

    Watchdog._watch_host = ends_late
    with distributed.process_group(timeout=60):
        distributed.barrier()
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dengine")]


def test_no_thread_outlives_the_block() -> None:
    """Else it may free the group when the interpreter ends, which aborts the process."""
    # Rank 0 hosts the store, whose process the other one watches.
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    assert run_ranks(threads_after_the_block, 2, init=False, env=environment, deadline_s=60) == [[], []]


def twice_after(rank: int, size: int, late: int) -> list[float]:
    if rank == late:
        time.sleep(1.0)  # the others find what was left behind, and not yet what is new
    return twice(rank, size)


def test_ranks_that_an_agent_starts_again_do_not_take_those_before_for_their_peers() -> None:
    """torchrun's agent keeps its store, with all that earlier ranks have written into it."""
    agents = own_store()
    for size, late in ((2, 0), (2, 0), (2, 1), (1, 0), (3, 0), (2, 1)):
        sums = run_ranks(twice_after, size, late, init=False, env={"MASTER_PORT": str(agents.port)}, deadline_s=40)
        assert sums == [[sum(range(size))] * 3] * size


def comes_or_not(rank: int, size: int) -> None:
    if rank != 1:
        with distributed.process_group(timeout=15):
            pass


def test_a_rank_that_never_comes_is_named_by_the_others() -> None:
    first, _, third = run_ranks(comes_or_not, 3, init=False, expect_failures=True, deadline_s=30)
    assert [first.error_type, third.error_type] == ["LaunchError"] * 2
    assert "rank 1 of 3 has not come" in first.error_message
    assert "rank 1 of 3 has not come" in third.error_message


def leaves_by_an_error(rank: int, size: int) -> None:
    with distributed.process_group(timeout=300):
        if rank == 1:
            raise ValueError("bad sample 4711")
        distributed.barrier("wait for rank 1")


def test_a_failing_rank_waits_for_nobody_and_wakes_the_others() -> None:
    failing, waiting = run_ranks(leaves_by_an_error, 2, init=False, expect_failures=True, deadline_s=60)[::-1]
    assert (failing.error_type, failing.error_message) == ("ValueError", "bad sample 4711")
    assert failing.seconds < 200
    assert waiting.error_type == "RemoteRankError"
    assert "bad sample 4711" in waiting.error_message
    assert waiting.seconds < 200


VALUE_DTYPES = (torch.float32, torch.float64, torch.int64, torch.bfloat16)


def reduced_values(rank: int, size: int, op: str) -> dict[str, Any]:
    value: dict[str, Any] = {str(dtype): torch.full((2, 3), rank + 1, dtype=dtype) for dtype in VALUE_DTYPES}
    value |= {"nested": [{"x": float(rank)}, (torch.tensor(rank),)], "count": 2**60 + rank}
    # Another order of keys must not pair one entry with another.
    ordered = dict(reversed(value.items())) if rank % 2 else value
    before = {name: part.clone() for name, part in value.items() if isinstance(part, torch.Tensor)}
    result = distributed.all_reduce(ordered, op)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value[name]) for name in before), "the input was changed"
    return result


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("op", ["sum", "min", "max"])
def test_all_reduce_gives_types_back_and_the_right_values(op: str, size: int) -> None:
    reduce = {"sum": sum, "min": min, "max": max}[op]
    for result in run_ranks(reduced_values, size, op):
        for dtype in VALUE_DTYPES:
            expected = torch.full((2, 3), reduce(range(1, size + 1)), dtype=dtype)
            assert result[str(dtype)].dtype == dtype
            assert torch.equal(result[str(dtype)], expected)
        assert result["nested"] == [{"x": float(reduce(range(size)))}, (torch.tensor(reduce(range(size))),)]
        assert result["count"] == reduce(2**60 + rank for rank in range(size))
        assert type(result["count"]) is int


def counted_collectives(rank: int, size: int) -> int:
    calls = []
    real = dist.all_reduce
    dist.all_reduce = lambda *args, **options: (calls.append(1), real(*args, **options))[1]
    try:
        distributed.all_reduce({str(i): torch.ones(i) for i in range(20)} | {"f": 1.0})
    finally:
        dist.all_reduce = real
    return len(calls)


def test_many_values_of_a_dtype_cost_one_collective() -> None:
    assert run_ranks(counted_collectives, 2) == [2, 2]  # float32 tensors, and the float64 of a number


def means(rank: int, size: int) -> tuple[float, str]:
    try:
        distributed.all_reduce(rank, "mean")
    except ValueError as error:
        refused = str(error)
    return distributed.all_reduce(float(rank), "mean"), refused


def test_the_mean_is_over_ranks_and_not_of_whole_numbers() -> None:
    for mean, refused in run_ranks(means, 3):
        assert mean == 1.0
        assert "mean of whole numbers" in refused


def objects(rank: int, size: int) -> tuple[list[Any], Any, Any]:
    return (
        distributed.all_gather_object({"rank": rank, "text": "x" * rank * 1000}),
        distributed.broadcast_object(("from", rank)),
        distributed.broadcast_object(("from", rank), source=size - 1),
    )


def test_objects_arrive_in_the_order_of_ranks() -> None:
    gathered = [{"rank": rank, "text": "x" * rank * 1000} for rank in range(3)]
    assert run_ranks(objects, 3) == [(gathered, ("from", 0), ("from", 2))] * 3


def prepared_first(rank: int, size: int, path: str, fails: bool) -> bool:
    with distributed.rank_zero_first():
        if rank == 0:
            if fails:
                raise OSError("no space")
            with open(path, "w") as file:
                file.write("ready")
        return os.path.exists(path)


def test_rank_zero_prepares_before_the_others_look(tmp_path: Any) -> None:
    assert run_ranks(prepared_first, 3, str(tmp_path / "data"), False) == [True] * 3


def test_a_preparation_that_fails_fails_everywhere(tmp_path: Any) -> None:
    outcomes = run_ranks(prepared_first, 3, str(tmp_path / "data"), True, expect_failures=True)
    assert [outcome.error_type for outcome in outcomes] == ["OSError", "RemoteRankError", "RemoteRankError"]
    assert all("no space" in outcome.error_message for outcome in outcomes)


def rank_zero_handlers(rank: int, size: int) -> tuple[list[int], str | None]:
    calls: list[int] = []
    engine = Engine(lambda engine, batch: batch)
    engine.on(Events.ITERATION_COMPLETED, lambda e: calls.append(e.state.iteration), rank_zero_only=True)

    @engine.on(Events.COMPLETED, rank_zero_only=True)
    def evaluate(engine: Engine) -> None:
        distributed.all_reduce(1.0)

    refused = None
    try:
        engine.run([1, 2])
    except RankZeroCollectiveError as error:
        refused = str(error)
    return calls, refused


def test_a_rank_zero_handler_runs_there_only_and_its_collectives_are_refused_at_once() -> None:
    (calls, refused), (other_calls, nothing) = run_ranks(rank_zero_handlers, 2, deadline_s=30)
    assert calls == [1, 2]
    assert refused is not None
    assert "evaluate runs on rank 0 only" in refused
    assert (other_calls, nothing) == ([], None)


def rank_zero_evaluates_alone(rank: int, size: int) -> int:
    evaluator = Engine(lambda engine, batch: batch, distributed=False)
    trainer = Engine(lambda engine, batch: distributed.all_reduce(float(batch)))
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1, 2, 3]) and None, rank_zero_only=True)
    trainer.run([1, 2], max_epochs=2)
    return evaluator.state.iteration


def test_an_engine_of_rank_zeros_own_takes_part_in_no_collective() -> None:
    assert run_ranks(rank_zero_evaluates_alone, 2, deadline_s=30) == [3, 0]


SCRIPT = """
import torch.distributed as dist
from dengine import distributed
with distributed.process_group() as world:
    print(f"rank {world.rank} of {world.size} by {world.launcher}: {distributed.all_reduce(float(world.rank))}")
"""


def test_one_script_runs_under_torchrun_and_as_plain_python(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launched = torchrun(script, 2)
    assert launched.returncode == 0, launched.output
    assert "rank 0 of 2 by torchrun: 1.0" in launched.output
    assert "rank 1 of 2 by torchrun: 1.0" in launched.output
    plain = run_python(script)
    assert plain.returncode == 0, plain.output
    assert "rank 0 of 1 by single: 0.0" in plain.output


def test_half_set_variables_name_the_missing_one(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_python(script, env={"RANK": "0"})
    assert done.returncode != 0
    assert "WORLD_SIZE is not set, although RANK=0 is" in done.output


def remote_error(rank: int, size: int) -> int:
    try:
        with distributed.rank_zero_first():
            if rank == 0:
                raise KeyError("x")
    except KeyError:
        return -1
    except RemoteRankError as error:
        return error.rank
    return -2


def test_the_error_of_another_rank_says_which() -> None:
    assert run_ranks(remote_error, 2) == [-1, 0]


def connected(rank: int, size: int) -> list[tuple[str | None, int]]:
    """What tells Gloo when to connect, and how many connections a rank has, if so many ranks are above the limit."""
    opening = importlib.import_module("dengine.distributed.process_group")
    opening._MOST_MESHED = size - 1  # type: ignore[attr-defined]
    found: list[tuple[str | None, int]] = []
    for chosen in ("0", None):
        os.environ.pop("TORCH_GLOO_LAZY_INIT", None)
        if chosen is not None:
            os.environ["TORCH_GLOO_LAZY_INIT"] = chosen
        with distributed.process_group(timeout=120):
            assert distributed.all_reduce(1) == size
            dist.all_reduce(torch.ones(100))
            found.append((os.environ.get("TORCH_GLOO_LAZY_INIT"), num_connections()))
            distributed.barrier()
    return found


def left(rank: int, size: int) -> list[int]:
    """The connections of groups that were left, by all or by a failure, before a garbage collection."""
    gc.collect()
    gc.disable()
    found = []
    for is_failing in (False, True):
        # One may hear of the other's first.
        with suppress(ZeroDivisionError, RemoteRankError), distributed.process_group(timeout=120):
            assert distributed.all_reduce(1) == size
            assert num_connections() > 1
            if is_failing:
                time.sleep(0.3)  # until the other one has left the sum, too
                raise ZeroDivisionError
        found.append(num_connections())
    return found


def test_the_connections_of_a_group_end_with_its_block() -> None:
    assert run_ranks(left, 2, init=False, deadline_s=60) == [[0, 0]] * 2


def num_connections() -> int:
    num = 0
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            num += torch_internals.is_socket_of_gloo(number, is_listening=False)
    return num


def test_many_ranks_connect_when_they_need_to_unless_the_user_says_otherwise() -> None:
    all_others, neighbours = 7, 5  # at a distance of 1, 2 and 4 to either side
    for found in run_ranks(connected, 8, init=False):
        assert found == [("0", 2 * all_others), ("1", 2 * neighbours)]  # two groups: torch's and this package's own
