"""No failure is swallowed, nobody waits without limit, and who is named is the one to blame."""

import builtins
import json
import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import free_port, run_ranks, torchrun
from torch import nn

from dengine import Engine, Events, distributed
from dengine.control import plane as planes
from dengine.control.control import Control
from dengine.errors import ConsistencyError, RemoteRankError, StallError
from dengine.launch import rendezvous as meeting
from dengine.parallel.options import Strategy

HOSTS_STORE = {"TORCHELASTIC_USE_AGENT_STORE": "False"}  # rank 0 hosts it, and no launcher


def plane() -> Control:
    found = planes.plane()
    assert isinstance(found, Control)
    return found


def hang() -> None:
    while True:
        time.sleep(3600)


# -- errors that are hard to tell ---------------------------------------------------------------------------------


class Mute(ValueError):
    def __str__(self) -> str:
        raise TypeError("no text")

    __repr__ = __str__


class Answers(ValueError):
    """Has every attribute that it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return 1


class Closed(ValueError):
    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("__"):  # contextlib sets the traceback
            raise TypeError("closed")
        super().__setattr__(name, value)


def causes_itself() -> BaseException:
    error = ValueError("planted")
    error.__cause__ = error
    return error


def circle_of_causes() -> BaseException:
    first, second, third = ValueError("planted"), RuntimeError("second"), KeyError("third")
    first.__cause__, second.__cause__, third.__cause__ = second, third, first
    return first


def circle_of_contexts() -> BaseException:
    first, second = ValueError("planted"), RuntimeError("second")
    first.__context__, second.__cause__ = second, first
    return first


def long_chain() -> BaseException:
    error: BaseException = KeyError("root")
    for number in range(20_000):
        above = RuntimeError(f"link {number}")
        above.__cause__, error = error, above
    last = ValueError("planted")
    last.__cause__ = error
    return last


def group_of_groups() -> BaseException:
    group = getattr(builtins, "ExceptionGroup", None)  # Python 3.11
    inner: Exception = ValueError("planted")
    for _ in range(200 if group else 0):
        inner = group("planted", [inner, RuntimeError("gloo")])
    return inner


ERRORS: list[Callable[[], BaseException]] = [
    causes_itself,
    circle_of_causes,
    circle_of_contexts,
    long_chain,
    group_of_groups,
    lambda: Mute("planted"),
    lambda: Answers("planted"),
    lambda: Closed("planted"),
]


def raises_each(rank: int, size: int) -> list[str]:
    heard = []
    for make in ERRORS:
        error = make() if rank == 1 else None

        def step(engine: Engine, batch: int, error: BaseException | None = error) -> None:
            if error is not None:
                raise error
            distributed.barrier("step")

        try:
            with distributed.process_group(timeout=60):
                Engine(step).run(range(3))
        except BaseException as caught:
            heard.append("own" if caught is error else f"{type(caught).__name__} {getattr(caught, 'rank', None)}")
    return heard


def test_an_error_is_told_whatever_it_came_of_and_whatever_its_own_methods_do() -> None:
    waiting, failing = run_ranks(raises_each, 2, init=False, deadline_s=120)
    assert failing == ["own"] * len(ERRORS)
    assert waiting == ["RemoteRankError 1"] * len(ERRORS)


# -- who hangs outside of a run -----------------------------------------------------------------------------------


def hangs(rank: int, size: int, where: str) -> None:
    with distributed.process_group(timeout=120, stall_timeout=2.0):
        trainer = Engine(lambda engine, batch: distributed.barrier("step"))
        if where == "before":
            if rank == 1:
                hang()
            distributed.all_reduce(1.0)
        trainer.run(range(3))
        if where == "between" and rank == 1:
            hang()
        if where != "after":
            trainer.run(range(3))
        if rank == 1:
            hang()


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_a_rank_that_hangs_outside_of_a_run_is_named_and_ended(where: str) -> None:
    for outcome in run_ranks(hangs, 3, where, init=False, expect_failures=True, deadline_s=90):
        if outcome.rank == 1:
            assert outcome.error_type == "ProcessDied", outcome
            assert "in hang" in outcome.output
        else:
            assert outcome.error_type == "StallError", outcome
            assert outcome.error_message.startswith("Rank 1 has made no progress"), outcome.error_message
            assert "in hang" in outcome.error_message, outcome.error_message


def dies_on_entering(rank: int, size: int) -> None:
    if rank == 1:
        dist.new_group = lambda *args, **kwargs: os._exit(9)
    with distributed.process_group(timeout=4):
        pass


def test_a_rank_that_ends_while_the_others_enter_is_told_and_not_in_gloos_words_alone() -> None:
    for outcome in run_ranks(dies_on_entering, 3, init=False, expect_failures=True, deadline_s=60):
        if outcome.rank != 1:
            assert outcome.error_type == "LaunchError", outcome
            assert "lost another rank while process_group() connected them" in outcome.error_message


def hangs_in_wrapping(rank: int, size: int) -> None:
    if rank == 1:
        nn.parallel.DistributedDataParallel.__init__ = lambda *args, **kwargs: hang()
    with distributed.process_group(timeout=120, stall_timeout=2.0):
        distributed.prepare_model(nn.Linear(2, 1), strategy="ddp")


def test_a_rank_that_hangs_while_a_model_is_wrapped_is_named() -> None:
    waiting, hanging = run_ranks(hangs_in_wrapping, 2, init=False, expect_failures=True, deadline_s=30)
    assert hanging.error_type == "ProcessDied", hanging
    assert waiting.error_type == "StallError", waiting
    assert waiting.error_message.startswith("Rank 1 has made no progress"), waiting.error_message
    assert "wrapping" in waiting.error_message


def prepares_otherwise(rank: int, size: int, strategies: tuple[Strategy | None, ...]) -> str:
    try:
        with distributed.process_group(timeout=60):
            if (strategy := strategies[rank]) is not None:
                distributed.prepare_model(nn.Linear(2, 1), strategy=strategy)
            distributed.barrier("prepared")
    except ConsistencyError as error:
        return str(error)
    except RemoteRankError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize(
    ("strategies", "parts"),
    [
        (("none", "ddp"), ("strategy='none'", "strategy='ddp'", "Call it alike on every rank")),
        ((None, "ddp"), ("prepare_model()", "barrier('prepared')")),
    ],
    ids=["otherwise", "not at all"],
)
def test_a_model_that_only_some_ranks_wrap_is_told(
    strategies: tuple[Strategy | None, ...], parts: tuple[str, ...]
) -> None:
    for told in run_ranks(prepares_otherwise, 2, strategies, init=False, deadline_s=30):
        for part in parts:
            assert part in told, told


def stalls_in_a_step(rank: int, size: int, folder: str) -> None:
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/{rank}.json"

    def step(engine: Engine, batch: int) -> None:
        if rank == 1:
            hang()
        distributed.barrier("step")

    with distributed.process_group(timeout=120, stall_timeout=2.0):
        Engine(step).run(range(3))


def test_who_hangs_is_the_root_cause_in_torchruns_summary_and_says_so(tmp_path: Path) -> None:
    run_ranks(stalls_in_a_step, 2, str(tmp_path), init=False, expect_failures=True, deadline_s=30)
    waiting, hanging = (json.loads((tmp_path / f"{rank}.json").read_text())["message"] for rank in range(2))
    assert "Rank 1 has made no progress" in hanging["extraInfo"]["py_callstack"]
    assert "in hang" in hanging["extraInfo"]["py_callstack"]
    assert int(hanging["extraInfo"]["timestamp"]) < int(waiting["extraInfo"]["timestamp"])


def fail_alike(rank: int, size: int, folder: str) -> bool:
    path = Path(folder, f"{rank}.json")
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(path)

    def step(engine: Engine, batch: int) -> None:
        raise ValueError("as on every rank")

    with distributed.process_group(timeout=60):
        with suppress(ValueError):
            Engine(step).run(range(3))
        Engine(lambda engine, batch: None).run(range(3))
    return path.exists()


def test_a_failure_that_all_ranks_have_handled_is_in_no_summary_of_a_later_one(tmp_path: Path) -> None:
    assert run_ranks(fail_alike, 3, str(tmp_path), init=False, deadline_s=30) == [False] * 3


def is_late(rank: int, size: int) -> None:
    with distributed.process_group(timeout=6, stall_timeout=600):
        if rank == 1:
            hang()
        distributed.barrier("all")


def test_whom_a_collective_waits_for_until_the_groups_own_timeout_is_named() -> None:
    """Not in Gloo's words, which name nobody, and not whoever gave up first."""
    for outcome in run_ranks(is_late, 3, init=False, expect_failures=True, deadline_s=90):
        assert outcome.error_type == ("ProcessDied" if outcome.rank == 1 else "StallError"), outcome
        if outcome.rank != 1:
            assert outcome.error_message.startswith("Rank 1 has made no progress"), outcome.error_message


def takes_its_time(rank: int, size: int) -> int:
    with distributed.process_group(timeout=120, stall_timeout=1.0):
        with distributed.rank_zero_first():
            time.sleep(2.5 if rank == 0 else 0.0)
        if rank == 1:
            for _ in range(30):
                time.sleep(0.1)
                distributed.progress()
        distributed.barrier("all")
        return distributed.all_reduce(1)


def test_the_inside_of_rank_zero_first_and_who_tells_of_progress_is_no_stall() -> None:
    assert run_ranks(takes_its_time, 3, init=False) == [3, 3, 3]


# -- frozen ranks -------------------------------------------------------------------------------------------------


def freezes(rank: int, size: int, how: str) -> None:
    killed: list[int] = []
    real = os.kill

    def kill(pid: int, number: int) -> None:
        real(pid, number)
        killed.append(number)

    os.kill = kill

    def step(engine: Engine, batch: int) -> None:
        if rank == 1 and batch == 1:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            re.match("(a+)+$", "a" * 60 + "b")  # holds the interpreter for years
        distributed.barrier("step")

    with distributed.process_group(timeout=120, stall_timeout=2.0):
        try:
            Engine(step).run(range(3))
        except StallError as error:
            os._exit(0 if (error.rank, killed) == (1, [signal.SIGKILL]) else 7)  # at once, as a launcher may end it


@pytest.mark.parametrize("how", ["stopped", "holds the interpreter"])
def test_a_frozen_rank_is_ended_and_stacks_are_shown_before_the_others_can_leave(how: str) -> None:
    survivor, frozen = run_ranks(freezes, 2, how, init=False, expect_failures=True, deadline_s=90)
    assert frozen.exitcode == -signal.SIGKILL, frozen
    assert frozen.error_type == "ProcessDied"
    assert survivor.exitcode == 0, survivor.output
    assert "dengine: rank 0 is at epoch 0, iteration 2" in survivor.output
    assert "Current thread" in survivor.output


# -- signals and kills in the midst of telling --------------------------------------------------------------------


def is_interrupted(rank: int, size: int) -> str:
    def from_handler(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed.")

    signal.signal(signal.SIGUSR1, from_handler)
    try:
        with distributed.process_group(timeout=60):
            if rank == 1:
                messages = plane().messages
                real = messages.publish

                def publish(**message: Any) -> None:
                    if message["kind"] == "failed":
                        os.kill(os.getpid(), signal.SIGUSR1)
                        time.sleep(0.2)
                    real(**message)

                messages.publish = publish
            Engine(lambda engine, batch: 1 / (rank - 1) if rank else distributed.barrier("step")).run(range(3))
    except Exception as error:
        of = error.__cause__ or error.__context__
        return f"{type(error).__name__}: {str(error).splitlines()[0]} of {type(of).__name__}"
    return "done"


def test_what_a_signals_handler_raises_while_a_failure_is_told_is_raised_and_the_failure_is_told() -> None:
    waiting, failing = run_ranks(is_interrupted, 2, init=False)
    assert "RemoteRankError: Rank 1 failed, so this rank stops too: ZeroDivisionError" in waiting
    assert failing == "RuntimeError: DataLoader worker (pid 4711) is killed by signal: Killed. of ZeroDivisionError"


class KillsItself:
    """A store that ends this process just before its n-th request that `is_meant` for one of some keys."""

    def __init__(self, store: Any, is_meant: Callable[[str, str], bool]) -> None:
        self._store, self._is_meant = store, is_meant

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)

        def request(*arguments: Any) -> Any:
            if arguments and self._is_meant(name, str(arguments[0])):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return request


def is_killed_while_it_tells(rank: int, size: int) -> None:
    with distributed.process_group(timeout=60):
        if rank == 1:
            messages = plane().messages
            messages._store = KillsItself(messages._store, lambda name, key: name == "set" and "message/" in key)

        def step(engine: Engine, batch: int) -> None:
            if rank == 1 and batch == 1:
                raise ValueError("planted")
            distributed.barrier("step")

        Engine(step).run(range(3))


def test_a_rank_that_is_killed_while_it_sends_a_message_keeps_nobody_from_hearing_the_next() -> None:
    first, killed, third = run_ranks(is_killed_while_it_tells, 3, init=False, expect_failures=True, deadline_s=60)
    assert killed.exitcode == -signal.SIGKILL
    for outcome in (first, third):
        assert outcome.error_type == "RemoteRankError", outcome
        assert outcome.error_message.startswith("Rank 1 "), outcome


def is_killed_while_it_leaves(rank: int, size: int) -> str:
    with distributed.process_group(timeout=60):
        distributed.barrier("all")
        if rank == 1:
            time.sleep(1.0)  # so that it comes last
            plane().messages.publish = lambda **message: os.kill(os.getpid(), signal.SIGKILL)
    return "left"


def test_a_rank_that_is_killed_before_it_says_that_all_have_come_keeps_nobody_from_leaving() -> None:
    outcomes = run_ranks(is_killed_while_it_leaves, 3, init=False, expect_failures=True, deadline_s=60)
    assert [outcome.value for outcome in outcomes] == ["left", None, "left"], outcomes


# -- what lies in the store ---------------------------------------------------------------------------------------

MALFORMED = [
    b"\xff\xfe\x00",
    b"GET / HTTP/1.1",
    b"[]",
    b"17",
    b"[" * 5000,
    b'{"kind": 3}',
    b'{"kind": "no such kind"}',
    b'{"kind": "failed"}',
    b'{"kind": "failed", "failure": {"kind": "raised", "rank": "one", "error": "x"}}',
    b'{"kind": "failed", "failure": {"kind": "raised", "rank": 99, "error": "x"}}',
    b'{"kind": "call", "number": "x"}',
    b'{"kind": "decided", "run": 0, "scope": "run", "epoch": 0, "target": "x", "reason": ""}',
    b'{"kind": "stop", "run": 0, "scope": [], "epoch": 0, "reason": ""}',
]


def hears_nonsense(rank: int, size: int) -> list[int]:
    with distributed.process_group(timeout=60, stall_timeout=2.0):

        def step(engine: Engine, batch: int) -> None:
            if rank == 1 and batch == 1:
                store, number = plane().context.store, plane().messages.number
                for text in MALFORMED:
                    while store.compare_set(f"message/{number}", "", text.decode("latin-1")) == b"":
                        pass
                    store.set(f"message/{number}", text.decode("latin-1"))
                    number += 1
                for key in ("at/0", "at/1", "collective/0/2"):
                    store.set(key, "nonsense")
            time.sleep(0.3)
            distributed.barrier("step")

        trainer = Engine(step)
        trainer.on(Events.ITERATION_COMPLETED(once=8), lambda engine: engine.terminate())
        return [trainer.run(range(20)).iteration, distributed.all_reduce(1)]


@pytest.mark.parametrize("hosts", [False, True])
def test_what_is_malformed_in_the_store_is_left_out_and_told_of_no_rank(hosts: bool) -> None:
    environment = {**HOSTS_STORE, "MASTER_PORT": str(free_port())} if hosts else {}
    outcomes = run_ranks(hears_nonsense, 2, init=False, env=environment, expect_failures=True)
    first, second = (outcome.value for outcome in outcomes)
    assert first == second, outcomes
    assert first in ([8, 2], [9, 2]), outcomes
    assert all("left out what is no message" in outcome.output for outcome in outcomes)


def listens_at(rank: int, size: int, port: int) -> list[str]:
    with distributed.process_group(timeout=60):
        distributed.barrier("all")
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                address, state = line.split()[1], line.split()[3]
                if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                    found.append(address.rpartition(":")[0])
        distributed.barrier("all")
        return found


def test_a_store_that_rank_zero_hosts_listens_at_the_address_of_the_ranks_alone() -> None:
    port = free_port()
    environment = {**HOSTS_STORE, "MASTER_PORT": str(port)}
    assert run_ranks(listens_at, 2, port, init=False, env=environment) == [["0100007F"]] * 2  # 127.0.0.1


# -- launchers ----------------------------------------------------------------------------------------------------


def in_a_part(rank: int, size: int, folder: str) -> list[str]:
    if rank == 2:
        return []
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with distributed.process_group(timeout=60) as world:
                told.append(f"{world.rank} of {world.size}")
                Engine(lambda engine, batch: 1 / (rank - 1) if rank else distributed.barrier("step")).run(range(3))
        except (ZeroDivisionError, RemoteRankError) as error:
            told.append(type(error).__name__)
    told += [str(each.message) for each in caught if "not shared beyond it" in str(each.message)]
    return told


def test_a_group_of_a_part_of_the_launched_ranks_says_what_is_not_shared_and_shares_the_rest(tmp_path: Path) -> None:
    first, second, _ = run_ranks(in_a_part, 3, str(tmp_path), init=False)
    assert first[:2] == ["0 of 2", "RemoteRankError"]
    assert second[:2] == ["1 of 2", "ZeroDivisionError"]
    assert first[2].startswith("This process group has 2 of the 3 ranks that torchrun started")
    assert first[2:] == second[2:]


def test_torchruns_root_cause_says_who_vanished_with_exit_code_zero(tmp_path: Path) -> None:
    """Such a process is no failure to torchrun, so that its summary must be that of another rank."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from dengine import Engine, distributed\n"
        "with distributed.process_group(timeout=60) as world:\n"
        "    def step(engine, batch):\n"
        "        if world.rank == 1 and batch == 2:\n"
        "            os._exit(0)\n"
        "        distributed.barrier('step')\n"
        "    Engine(step).run(range(9))\n"
    )
    done = torchrun(script, 2)
    assert done.returncode != 0
    summary = done.output.partition("Root Cause (first observed failure)")[2]
    assert re.search("traceback : Rank 1 vanished, so this rank stops too", summary), done.output


def comes_late(rank: int, size: int) -> None:
    meeting._LEAST_STALL_S = 3.0
    if rank != 1:
        with distributed.process_group(timeout=300, stall_timeout=0.5):
            pass


def test_a_rank_that_never_comes_is_named_after_the_stall_timeout() -> None:
    outcomes = run_ranks(comes_late, 3, init=False, expect_failures=True, deadline_s=100)
    for outcome in outcomes[::2]:
        assert outcome.error_type == "StallError", outcome
        assert "rank 1 of 3 has not come" in outcome.error_message
