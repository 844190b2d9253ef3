"""One rank goes wrong: every other one says which, and where; nobody hangs, and nobody waits longer than he must.

The oracle is the fault itself: faults.py makes it happen on a rank, in a place and at an iteration that the test chose.
DENGINE_FAULT_RUNS=50 repeats each fault so often.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults import AT_ITERATION, FAULTS, PLACES, happen, train
from ranks import Completed, Outcome, free_port, run_ranks, torchrun

from dengine import Engine, Events, distributed
from dengine.checkpoint import verify
from dengine.handlers import Checkpoint

HERE = Path(__file__).parent
RUNS = range(int(os.environ.get("DENGINE_FAULT_RUNS", "1")))
STALL_TIMEOUT_S = 6.0
# After a raise or a kill, and after the stall timeout of a hang: 5 s on a machine that is free; otherwise it is the
# timeout of the group that ends them.
GONE_S = 5.0 if os.environ.get("DENGINE_TEST_IDLE") else 30.0

HANGS = ("stop", "sleep", "leave")
LAZY = {"TORCH_GLOO_LAZY_INIT": "1"}
WHERE = {
    "step": rf"epoch 1, iteration {AT_ITERATION}, in the step train.<locals>.train_step",
    "handler": rf"epoch 1, iteration {AT_ITERATION}, in handler .* of ITERATION_COMPLETED",
    "data": rf"epoch 1, iteration {AT_ITERATION - 1}, fetching batch 2 of the epoch",
    "metric": rf"epoch 1, iteration {AT_ITERATION}, updating the metrics",
    "checkpoint": "epoch 1, iteration 10, in handler Checkpoint of EPOCH_COMPLETED",
    "evaluation": "epoch 1, iteration 10, in handler .*validate of EPOCH_COMPLETED, and there at epoch 0, iteration 2",
}


def job(rank: int, size: int, fault: str, place: str, culprit: int, folder: str) -> str:
    with distributed.process_group(timeout=120, stall_timeout=STALL_TIMEOUT_S):
        train(fault, place, culprit, folder)
    return "done"


def happened(
    tmp_path: Path,
    job: Callable[..., Any],
    size: int,
    *arguments: object,
    limit_s: float,
    hosts: bool = False,
    lazy: bool = False,
) -> list[Outcome[str]]:
    """The outcomes of all ranks of `job`, all gone within `limit_s` of the fault. `hosts`: rank 0 hosts the store, not
    a launcher. `lazy`: Gloo connects two ranks when a collective first needs it.
    """
    marker = tmp_path / "happened"
    environment = {"FAULT_FILE": str(marker)}
    if lazy:
        environment |= LAZY
    if hosts:
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    started_s = time.time()
    outcomes: list[Outcome[str]] = run_ranks(job, size, *arguments, init=False, env=environment, expect_failures=True)
    assert marker.exists(), outcomes
    delay_s = float(marker.read_text()) - started_s
    for outcome in outcomes:
        assert outcome.error_type != "DeadlineExceeded", outcome
        assert outcome.seconds - delay_s < limit_s, outcome
    return outcomes


def trained(
    tmp_path: Path, fault: str, place: str, culprit: int, size: int, *, hosts: bool, lazy: bool = False
) -> list[Outcome[str]]:
    limit_s = GONE_S + (STALL_TIMEOUT_S if fault in HANGS else 0)
    arguments = (fault, place, culprit, str(tmp_path / "saved"))
    return happened(tmp_path, job, size, *arguments, limit_s=limit_s, hosts=hosts, lazy=lazy)


def check_names(outcomes: list[Outcome[str]], fault: str, place: str, culprit: int) -> None:
    expected = "StallError" if fault in HANGS else "RemoteRankError"
    for outcome in outcomes:
        if (fault, place) == ("raise", "checkpoint"):  # a save that fails is raised on all ranks alike
            assert outcome.error_type == "CheckpointError", outcome
            assert f"rank {culprit}" in outcome.error_message
            assert "ValueError: sample 4711 is broken" in outcome.error_message
            continue
        if outcome.rank == culprit:
            continue
        assert outcome.error_type == expected, outcome
        words = {"raise": "failed", "exit": "failed", "kill": "vanished", "_exit": "vanished"}
        found = re.match(rf"Rank (\d+),? {words.get(fault, '(has|which)')}", outcome.error_message)
        assert found is not None, outcome.error_message
        assert found[1] == str(culprit), outcome.error_message
        if fault == "raise":
            assert "ValueError: sample 4711 is broken" in outcome.error_message
            assert "in happen" in outcome.error_message  # its traceback
        if fault in ("raise", "exit"):
            assert re.search(f"Rank {culprit} was at {WHERE[place]}", outcome.error_message), outcome.error_message
        if fault == "sleep":
            assert re.search(f"Rank {culprit} is at {WHERE[place]}", outcome.error_message), outcome.error_message
    own = outcomes[culprit]
    if fault == "raise" and place != "checkpoint":
        assert (own.error_type, own.error_message) == ("ValueError", "sample 4711 is broken")
    if fault in ("sleep", "stop"):
        assert own.error_type == "ProcessDied"
    if fault == "leave":
        assert own.error_type == "StallError"


# Every fault in every place, with another culprit, number of ranks and host of the store each time.
CASES = [
    (fault, place, number % size, size, number % 2 == 0)
    for number, ((fault, place), size) in enumerate(
        zip(
            [(f, p) for f, p in product(FAULTS, PLACES) if f != "leave" or p == "step"],
            [2, 3, 4, 3] * 10,
            strict=False,
        )
    )
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("fault", "place", "culprit", "size", "hosts"), CASES)
def test_the_rank_that_goes_wrong_is_named_by_all_others(
    tmp_path: Path, fault: str, place: str, culprit: int, size: int, hosts: bool, run: int
) -> None:
    outcomes = trained(tmp_path, fault, place, culprit, size, hosts=hosts)
    check_names(outcomes, fault, place, culprit)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_rank_zero_takes_the_store_with_it_and_is_named_all_the_same(tmp_path: Path, fault: str, run: int) -> None:
    outcomes = trained(tmp_path, fault, "step", 0, 3, hosts=True)
    check_names(outcomes, fault, "step", 0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("fault", "size", "hosts"), [("raise", 4, True), ("kill", 8, False), ("stop", 3, True), ("sleep", 4, False)]
)
def test_the_culprit_is_named_if_ranks_connect_only_when_they_need_it(
    tmp_path: Path, fault: str, size: int, hosts: bool, run: int
) -> None:
    outcomes = trained(tmp_path, fault, "step", 1, size, hosts=hosts, lazy=True)
    check_names(outcomes, fault, "step", 1)


def exchange_all(rank: int, size: int, group: dist.ProcessGroup) -> None:
    mine = torch.ones(size)
    dist.all_to_all_single(torch.empty_like(mine), mine, group=group)


def pass_on(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Each rank waits for the one before it, as the stages of a pipeline do."""
    number = torch.zeros(1)
    if rank:
        dist.recv(number, rank - 1, group=group)
    if rank < size - 1:
        dist.send(number, rank + 1, group=group)


def reduce_all(rank: int, size: int, group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.ones(3), group=group)


FIRST = {each.__name__: each for each in (exchange_all, pass_on, reduce_all)}


def fails_first(rank: int, size: int, fault: str, culprit: int, names: list[str]) -> list[str]:
    """One rank goes wrong before the first collective of its kind in a group that the script has made."""
    told = []
    for name in names:
        try:
            fail_first(rank, size, fault, culprit, name)
        except Exception as error:
            told.append(f"{name}: {type(error).__name__} {getattr(error, 'rank', None)}")
            if fault != "raise":
                raise
    return told


def fail_first(rank: int, size: int, fault: str, culprit: int, name: str) -> None:
    mesh = {"dp": 2, "tp": 2}
    with distributed.process_group(timeout=120, stall_timeout=STALL_TIMEOUT_S, mesh=mesh) as here:
        assert here.mesh is not None
        own, of_mesh = dist.new_group(), here.mesh["tp"].get_group()

        def step(engine: Engine, batch: int) -> None:
            dist.all_reduce(torch.ones(1), group=of_mesh)
            if rank == culprit:
                time.sleep(0.3)
                happen(fault)
            FIRST[name](rank, size, own)
            dist.barrier()

        Engine(step).run(range(3))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_rank_that_waits_in_a_group_of_the_script_s_own_is_freed(tmp_path: Path, lazy: bool) -> None:
    outcomes = happened(tmp_path, fails_first, 4, "raise", 1, list(FIRST), limit_s=120.0, lazy=lazy)
    for outcome in outcomes:
        who = "ValueError None" if outcome.rank == 1 else "RemoteRankError 1"
        assert outcome.value == [f"{name}: {who}" for name in FIRST], outcome


@pytest.mark.parametrize(("fault", "name"), [("kill", "exchange_all"), ("stop", "pass_on"), ("sleep", "reduce_all")])
def test_a_rank_that_waits_for_a_first_connection_is_freed(tmp_path: Path, fault: str, name: str) -> None:
    limit_s = GONE_S + (STALL_TIMEOUT_S if fault in HANGS else 0)
    outcomes = happened(tmp_path, fails_first, 4, fault, 1, [name], limit_s=limit_s, lazy=True)
    for outcome in outcomes[:1] + outcomes[2:]:
        assert outcome.error_type == ("RemoteRankError" if fault == "kill" else "StallError"), outcome
        assert outcome.error_message.startswith("Rank 1 "), outcome


def killed_midway(rank: int, size: int, culprit: int, delay_s: float) -> None:
    """A rank is killed while 64 MB of gradients are on their way."""
    with distributed.process_group(timeout=120):
        model = distributed.prepare_model(torch.nn.Linear(4000, 4000))

        def step(engine: Engine, batch: int) -> None:
            loss = model(torch.ones(2, 4000)).sum()
            if batch == 2 and rank == culprit:
                threading.Timer(delay_s, happen, ("kill",)).start()
            loss.backward()

        Engine(step).run(range(100))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("size", "delay_s"), [(2, 0.01), (3, 0.03), (3, 0.08)])
def test_a_rank_killed_while_gradients_are_on_their_way_is_named(
    tmp_path: Path, size: int, delay_s: float, run: int
) -> None:
    outcomes = happened(tmp_path, killed_midway, size, 1, delay_s, limit_s=GONE_S)
    for outcome in outcomes[::2]:
        # Where Gloo had begun to send what it could not, it never returns, and the rank is ended by its watch.
        is_stuck = outcome.error_type == "ProcessDied" and "cannot leave by itself" in outcome.output
        assert outcome.error_type == "RemoteRankError" or is_stuck, outcome
        assert "Rank 1 vanished" in (outcome.output if is_stuck else outcome.error_message), outcome


def summary_of(done: Completed) -> str:
    return done.output.partition("Root Cause (first observed failure)")[2]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("fault", "culprit"), [("raise", 1), ("kill", 1), ("sleep", 0)])
def test_the_summary_of_torchrun_names_the_cause(tmp_path: Path, fault: str, culprit: int, run: int) -> None:
    done = torchrun(
        HERE / "support" / "faults.py",
        2,
        fault,
        "step",
        str(culprit),
        str(STALL_TIMEOUT_S),
        str(tmp_path),
        env={"FAULT_FILE": str(tmp_path / "happened"), "PYTHONPATH": str(HERE.parent)},
        deadline_s=60,
    )
    assert done.returncode != 0
    summary = summary_of(done)
    assert summary, done.output
    if fault == "raise":
        assert re.search(r"rank\s*: 1 ", summary), summary
        assert "sample 4711 is broken" in summary
        assert "in happen" in summary
    elif fault == "kill":
        assert "Signal 9 (SIGKILL)" in summary
    else:
        assert "Rank 0 has made no progress" in done.output
        assert "time.sleep" in done.output or "in happen" in done.output


def evaluates_long(rank: int, size: int) -> int:
    """Rank 0 evaluates by itself, longer than the stall timeout, while the others wait for it."""
    with distributed.process_group(timeout=300, stall_timeout=4.0):
        trainer = Engine(lambda engine, batch: distributed.barrier("step"))

        @trainer.on(Events.EPOCH_COMPLETED, rank_zero_only=True)
        def evaluate(engine: Engine) -> None:
            Engine(lambda engine, batch: time.sleep(0.4), distributed=False).run(range(15))

        @trainer.on(Events.ITERATION_COMPLETED(once=2), rank_zero_only=True)
        def work(engine: Engine) -> None:
            for _ in range(15):
                time.sleep(0.4)
                distributed.progress()

        trainer.run(range(3))
        return distributed.all_reduce(1)


def test_long_work_that_goes_on_is_no_stall() -> None:
    assert run_ranks(evaluates_long, 3, init=False) == [3, 3, 3]


def saves_long(rank: int, size: int, folder: str, asynchronous: bool) -> int:
    """The disk takes longer for one file than the stall timeout, but goes on."""
    real = os.write

    def slow(descriptor: int, data: bytes) -> int:
        time.sleep(0.7 if len(data) > 1000 else 0)
        return real(descriptor, data[:1_000_000])

    os.write = slow
    with distributed.process_group(timeout=300, stall_timeout=4.0):
        model = distributed.prepare_model(torch.nn.Linear(1500, 1500))
        trainer = Engine(lambda engine, batch: distributed.barrier("step"))
        trainer.on(Events.EPOCH_COMPLETED, Checkpoint({"model": model}, folder, asynchronous=asynchronous))
        trainer.run(range(2))
        return distributed.all_reduce(1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_goes_on_is_no_stall(tmp_path: Path, asynchronous: bool) -> None:
    assert run_ranks(saves_long, 2, str(tmp_path), asynchronous, init=False) == [2, 2]
    assert verify(tmp_path / "checkpoint_2.pt").num_bytes > 9_000_000


def uneven(rank: int, size: int) -> list[int]:
    """One rank has much more to evaluate, and one nothing; none of them waits for ever."""
    with distributed.process_group(timeout=300, stall_timeout=4.0):
        evaluator = Engine(lambda engine, batch: time.sleep(0.2))
        lengths = [evaluator.run(range(20 * rank)).iteration for _ in range(2)]
        return [*lengths, distributed.all_reduce(1)]


def test_ranks_with_uneven_work_are_no_stall() -> None:
    assert run_ranks(uneven, 3, init=False) == [[0, 0, 3], [20, 20, 3], [40, 40, 3]]


def lags(rank: int, size: int) -> None:
    """No collective holds rank 0, and rank 1 takes its time to leave."""

    def step(engine: Engine, batch: int) -> None:
        time.sleep(0.05)
        if rank == 1 and batch == 3:
            raise ZeroDivisionError("planted")

    trainer = Engine(step)
    trainer.on(Events.EXCEPTION_RAISED, lambda engine: time.sleep(4.0 * rank))
    with distributed.process_group(timeout=300):
        try:
            trainer.run(range(4000))
        finally:
            print(f"left in iteration {trainer.state.iteration}")


def test_a_rank_that_lags_behind_a_failed_one_stops_before_the_end_of_its_epoch() -> None:
    first, second = run_ranks(lags, 2, init=False, expect_failures=True)
    assert (first.error_type, second.error_type) == ("RemoteRankError", "ZeroDivisionError")
    found = re.search("left in iteration ([0-9]+)", first.output)
    assert found is not None
    assert int(found[1]) < 3000


def catches(rank: int, size: int) -> list[str]:
    """The script catches the failure and sleeps on: the others must not have to wait for its process to end."""
    told = []
    try:
        with distributed.process_group(timeout=300):
            trainer = Engine(lambda engine, batch: 1 / (rank - 1) if batch == 3 else distributed.all_reduce(1.0))
            try:
                trainer.run(range(6))
            except Exception as error:
                told.append(type(error).__name__)
            if rank == 1:
                time.sleep(3.0)
            told.append(str(distributed.all_reduce(1.0)))
    except Exception as error:
        told.append(f"{type(error).__name__} {getattr(error, 'rank', None)}")
    return told


def test_a_failure_that_the_script_catches_reaches_those_who_wait_in_a_collective() -> None:
    first, culprit, third = run_ranks(catches, 3, init=False)
    assert culprit == ["ZeroDivisionError", "RemoteRankError 1"]
    assert first == third == ["RemoteRankError", "RemoteRankError 1"]


def interrupted(rank: int, size: int) -> str:
    def step(engine: Engine, batch: int) -> None:
        if rank == 1 and batch == 3:
            os.kill(os.getpid(), signal.SIGINT)
        distributed.barrier("step")

    try:
        with distributed.process_group(timeout=300):
            Engine(step).run(range(6))
    except KeyboardInterrupt as error:
        return f"{type(error).__name__} {getattr(error, 'rank', None)}"
    return "done"


def test_an_interrupt_on_one_rank_is_an_interrupt_on_all() -> None:
    assert run_ranks(interrupted, 3, init=False) == ["RemoteInterrupt 1", "KeyboardInterrupt None", "RemoteInterrupt 1"]
