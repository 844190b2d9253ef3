"""What must be the same on all ranks, and is not: the rank and the first thing that differs are named on every rank."""

import gc
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcome, run_ranks
from torch import nn

from dengine import ConsistencyError, Engine, Events, distributed
from dengine.comm import copies
from dengine.comm.consistency import gather_distinct
from dengine.comm.copies import tensor_digest
from dengine.handlers import ConsistencyCheck, TerminateOnNan, TimeLimit
from dengine.metrics import Average


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def checked(rank: int, size: int, culprit: int, what: str) -> str:
    with distributed.process_group(timeout=300):
        net = distributed.prepare_model(model())
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        bare = distributed.unwrap_model(net)
        bare[1].running_mean += rank
        if rank == culprit:
            with torch.no_grad():
                if what == "parameter":
                    # The last bit of one number.
                    bare[2].weight.view(torch.int32)[1, 2] ^= 1
                elif what == "sign of zero":
                    bare[0].bias.zero_()[0] = -0.0
                elif what == "moment":
                    optimizer.state[bare[0].weight]["exp_avg_sq"] *= 2
                elif what == "rate":
                    optimizer.param_groups[0]["lr"] = 0.5
        if what == "sign of zero" and rank != culprit:
            with torch.no_grad():
                bare[0].bias.zero_()
        trainer = Engine(lambda engine, batch: None)
        trainer.on(Events.ITERATION_COMPLETED(every=2), ConsistencyCheck(net, optimizer))
        try:
            trainer.run(range(4))
        except ConsistencyError as error:
            return f"{trainer.state.iteration}: {error}"
        return "same"


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("parameter", "2.weight"),
        ("sign of zero", "0.bias"),
        ("moment", "optimizer.state.0.exp_avg_sq"),
        ("rate", "optimizer.param_groups.0.lr"),
    ],
)
@pytest.mark.parametrize("culprit", [0, 2])
def test_what_differs_is_named_with_the_rank_that_is_alone_with_it(what: str, name: str, culprit: int) -> None:
    for told in run_ranks(checked, 3, culprit, what, init=False, deadline_s=60):
        assert told.startswith("2: ")
        assert f"'{name}' of rank {culprit} is not that of rank {1 if culprit == 0 else 0}" in told


def test_ranks_that_train_the_same_are_left_alone_whatever_their_buffers() -> None:
    assert run_ranks(checked, 3, -1, "nothing", init=False, deadline_s=60) == ["same"] * 3


def test_numbers_are_compared_by_their_bits() -> None:
    numbers = [0.0, -0.0, 0.1, math.nan, math.inf, -math.inf, 2**53, 2**53 + 1, 10**400, "a"]
    assert len(set(copies._digests(numbers).tolist())) == len(numbers)
    assert copies._digests([1]) == copies._digests([1.0])


def test_every_bit_counts() -> None:
    value = torch.randn(7)
    found = {int(tensor_digest(value))}
    for place in range(7):
        for bit in range(31):
            changed = value.clone()
            changed.view(torch.int32)[place] ^= 1 << bit
            found.add(int(tensor_digest(changed)))
    swapped = value[torch.tensor([1, 0, 2, 3, 4, 5, 6])]
    found.add(int(tensor_digest(swapped)))
    # Two flips of a sign do not cancel.
    found.add(int(tensor_digest(torch.cat([-value[:2], value[2:]]))))
    assert len(found) == 1 + 7 * 31 + 2


def prepared(rank: int, size: int, kind: str) -> None:
    with distributed.process_group(timeout=300):
        width = 5 if kind == "shape" and rank == 2 else 4
        net = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2, bias=not (kind == "number" and rank == 2)))
        distributed.prepare_model(net)


@pytest.mark.parametrize(("kind", "words"), [("shape", "0.weight [5, 4]"), ("number", "3 of them")])
def test_models_of_another_shape_are_refused_where_they_are_prepared(kind: str, words: str) -> None:
    outcomes = run_ranks(prepared, 3, kind, init=False, expect_failures=True, deadline_s=60)
    assert "ConsistencyError" in {outcome.error_type for outcome in outcomes}
    for outcome in outcomes:
        # A rank that is seconds late, on a busy machine, hears first that another one has raised it.
        assert outcome.error_type in ("ConsistencyError", "RemoteRankError"), outcome
        assert "rank 2 has" in outcome.error_message
        assert words in outcome.error_message


def grown(rank: int, size: int) -> None:
    with distributed.process_group(timeout=300):
        net = distributed.prepare_model(model())
        trainer = Engine(lambda engine, batch: None)
        trainer.run([1])
        if rank == 1:
            distributed.unwrap_model(net).add_module("late", nn.Linear(1, 1))
        trainer.run([1])


def test_a_model_that_changes_on_one_rank_is_found_at_the_next_run() -> None:
    for outcome in run_ranks(grown, 3, init=False, expect_failures=True, deadline_s=60):
        assert outcome.error_type == "ConsistencyError"
        assert "rank 1" in outcome.error_message


def swapped(rank: int, size: int, kind: str) -> Any:
    with distributed.process_group(timeout=300):
        if kind == "lines":
            if rank == 1:
                accuracy = distributed.all_reduce(0.5)
                loss = distributed.all_reduce(2.0)
            else:
                loss = distributed.all_reduce(2.0)
                accuracy = distributed.all_reduce(0.5)
            return loss, accuracy
        if kind == "names":
            return [distributed.all_reduce(1.0, name=name) for name in ("loss", "acc")[:: -1 if rank == 1 else 1]]
        if kind == "kinds":
            return distributed.barrier("here") if rank == 1 else distributed.all_reduce(1.0)
        if kind == "keys":
            return distributed.all_reduce({"loss" if rank == 1 else "acc": 1.0}, name=None)
        return distributed.all_reduce(1.0, "max" if rank == 1 else "sum")


@pytest.mark.parametrize("kind", ["lines", "names", "kinds", "keys", "ops"])
def test_two_ranks_that_call_different_collectives_are_both_named(kind: str) -> None:
    outcomes: list[Outcome[Any]] = run_ranks(swapped, 3, kind, init=False, expect_failures=True, deadline_s=60)
    assert {outcome.error_type for outcome in outcomes} <= {"ConsistencyError", "RemoteRankError"}, outcomes
    for outcome in outcomes:
        assert "different collectives" in outcome.error_message
        assert "rank 1 calls" in outcome.error_message
        assert outcome.error_message.count("test_consistency.py:") >= 2


def branched(rank: int, size: int) -> tuple[float, str, list[int]]:
    with distributed.process_group(timeout=300):
        if rank == 0:
            total, text = distributed.all_reduce(5.0, name="total"), distributed.broadcast_object("hello")
        else:
            total = distributed.all_reduce(1.0, name="total")
            text = distributed.broadcast_object("")
        return total, text, distributed.all_gather_object(rank)


def test_one_collective_may_be_called_from_two_lines_under_one_name() -> None:
    assert run_ranks(branched, 3, init=False, deadline_s=60) == [(7.0, "hello", [0, 1, 2])] * 3


def alike(rank: int, size: int) -> list[str]:
    """All ranks raise the same in a run; a script may handle it, and goes on with its group."""
    with distributed.process_group(timeout=300):
        told = []
        for _ in range(3):
            evaluator = Engine(lambda engine, batch: batch)
            evaluator.add_metric(Average(), "mean")
            try:
                evaluator.run([1.0] if rank == size else [])
            except Exception as error:
                told.append(type(error).__name__)
            told.append(str(distributed.all_reduce(1.0)))
        return told


def test_an_error_that_all_ranks_raise_and_handle_ends_nothing_but_the_run() -> None:
    assert run_ranks(alike, 3, init=False, deadline_s=60) == [["ValueError", "3.0"] * 3] * 3


def ended(rank: int, size: int, by: str) -> int:
    with distributed.process_group(timeout=300):
        trainer = Engine(lambda engine, batch: float("nan") if rank == 1 and batch == 5 else 1.0)
        trainer.on(Events.ITERATION_COMPLETED, lambda engine: distributed.barrier("step"))
        handler = TerminateOnNan() if by == "nan" else TimeLimit(0.2 if rank == 1 else 1000)
        trainer.on(Events.ITERATION_COMPLETED, handler)
        return trainer.run(range(100_000)).iteration


@pytest.mark.parametrize("by", ["nan", "time"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_one_rank_finds_ends_the_run_of_all_at_one_iteration(by: str) -> None:
    found = run_ranks(ended, 3, by, init=False, deadline_s=60)
    assert len(set(found)) == 1
    assert found[0] < 100_000
    if by == "nan":
        assert 6 <= found[0] <= 9


def builds_many(rank: int, size: int) -> str:
    """Models that hold themselves die when a rank's garbage collector comes to them: here on rank 0 alone."""
    gc.disable()
    with distributed.process_group(timeout=300):
        for width in (3, 4, 5):
            net: Any = nn.Linear(2, width)
            net.itself = [net]
            distributed.prepare_model(net, strategy="none")
            if rank == 0:
                net = None
                gc.collect()
            Engine(lambda engine, batch: None).run(range(2))
            net = None
        other = distributed.prepare_model(nn.Linear(2, 2), strategy="none")
        if rank == 1:
            other.more = nn.Linear(1, 1)
        try:
            Engine(lambda engine, batch: None).run(range(2))
        except ConsistencyError as error:
            return str(error)
    return "same"


def test_models_that_only_some_ranks_have_collected_are_no_difference() -> None:
    for told in run_ranks(builds_many, 2, init=False, deadline_s=60):
        assert "rank 1 has 4 of them, rank 0 has 2" in told


def compared(rank: int, size: int) -> list[tuple[list[list[str]], int, list[object]]]:
    """What ranks have, how many objects that are, and what this rank has sent: of the same, and if one differs."""
    sent: list[object] = []
    real = dist.all_gather_object
    dist.all_gather_object = lambda found, value, **options: (sent.append(value), real(found, value, **options))[1]
    found = []
    with distributed.process_group(timeout=300) as here:
        for value in (["a", "b"], ["a", "b" if rank != 1 else "c"], ["a", str(rank % 2)]):
            sent.clear()
            of_ranks = gather_distinct(value, here)
            found.append((of_ranks, len(set(map(id, of_ranks))), [each for each in sent if type(each) is not int]))
    return found


def test_of_what_ranks_compare_only_what_differs_is_sent_and_each_once() -> None:
    for rank, (same, one, two) in enumerate(run_ranks(compared, 4, init=False, deadline_s=60)):
        assert same == ([["a", "b"]] * 4, 1, []), rank
        own = [["a", "c"] if rank == 1 else ["a", "b"] if rank == 0 else None]
        assert one == ([["a", "b"], ["a", "c"], ["a", "b"], ["a", "b"]], 2, own), rank
        assert two == ([["a", "0"], ["a", "1"]] * 2, 2, [["a", str(rank)] if rank < 2 else None]), rank
