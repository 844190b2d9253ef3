"""Real ranks for tests: a function on N processes, a script under torchrun, and nothing left over afterwards.

    from ranks import run_ranks                     # the one import form, here and in every folder below

    def sum_of_ranks(rank: int, size: int, scale: float) -> float:      # module level, in the test module
        total = torch.tensor(rank * scale)
        dist.all_reduce(total)
        return total.item()

    def test_all_ranks_get_the_sum() -> None:
        assert run_ranks(sum_of_ranks, 2, 10.0) == [10.0, 10.0]

How a test module gets into a rank: pytest's importlib mode leaves it without an importable name, so a rank loads it
from its file and registers it under the name that it has in the parent; classes of the module then pickle both ways.
It may import what is on `sys.path` (../conftest.py puts this folder and the repository there): absolute imports only.

What differs from torchrun: ranks are forked from a server that has torch loaded (0.1 s instead of 7 s), so they share
one hash seed: a bug in the order of a set shows only under `torchrun()`. An `assert` in a rank is not rewritten by
pytest: return values and assert in the parent, or give the assert a message.
A rank's SIGALRM and `faulthandler.dump_traceback_later` belong to this harness. Linux only (/proc).
"""

import faulthandler
import functools
import importlib.util
import io
import math
import multiprocessing
import operator
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Generic, Literal, TypeVar, cast, overload

import torch
import torch.distributed as dist

__all__ = [
    "PATIENCE",
    "Completed",
    "DeadlineExceeded",
    "Outcome",
    "RankFailed",
    "free_port",
    "own_store",
    "run_command",
    "run_python",
    "run_ranks",
    "torchrun",
]

T = TypeVar("T")
# torch._dynamo: the first optimizer or DDP imports it, which takes a rank 5 s and more where several share a core.
PRELOAD = ("pytest", "torch", "torch.distributed", "torch._dynamo", "accelerate", "ranks", "dengine.handlers")
TAG = "DENGINE_TEST_PROCESS"  # an environment variable by which we know the processes that we started
PATIENCE = 5  # deadlines end what hangs: on a machine that is busy, all others must stay far below them
OUTPUT_LINES = 40  # of each rank, in a failure's message


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of one rank."""

    rank: int
    value: T | None
    error_type: str | None  # None: returned, exit code 0. Else the exception's name, or "ProcessDied" (no exception
    error_message: str  # of its own), or "DeadlineExceeded" (the harness killed it)
    traceback: str  # of the exception; of a rank that met the deadline: the stacks of its threads
    exitcode: int  # -9: SIGKILLed, by the harness or by somebody else: error_type tells which
    seconds: float  # from the start of the ranks to this one's answer or end
    output: str  # stdout and stderr, in the order written


class RankFailed(Exception):
    """Ranks raised or died. `rank` was the first; `failures`: rank -> (exception name, message, traceback)."""

    def __init__(self, outcomes: Collection[Outcome[T]]) -> None:
        failed = sorted((o for o in outcomes if o.error_type and not _is_cut(o)), key=lambda outcome: outcome.seconds)
        cut = [outcome for outcome in outcomes if _is_cut(outcome)]
        self.rank = failed[0].rank
        self.failures = {o.rank: (str(o.error_type), o.error_message, o.traceback) for o in failed}
        super().__init__(
            f"rank {self.rank} of {len(outcomes)} failed with {failed[0].error_type}: "
            f"{failed[0].error_message}\n" + "".join(map(_report, failed + cut))
        )


class DeadlineExceeded(Exception):
    """The deadline passed first. Everything was killed; `stacks`: rank -> what its threads were doing."""

    def __init__(self, message: str, outcomes: Collection[Outcome[T]] = ()) -> None:
        cut = [outcome for outcome in outcomes if _is_cut(outcome)]
        self.finished = [outcome.rank for outcome in outcomes if not _is_cut(outcome)]
        self.unfinished = [outcome.rank for outcome in cut]
        self.stacks = {outcome.rank: outcome.traceback for outcome in cut}
        super().__init__(message + "".join(map(_report, cut)))


@overload
def run_ranks(
    fn: Callable[..., T],
    size: int,
    *args: object,
    deadline_s: float = ...,
    grace_s: float = ...,
    backend: str = ...,
    init: bool = ...,
    env: Mapping[str, str] | None = ...,
    expect_failures: Literal[False] = ...,
) -> list[T]: ...
@overload
def run_ranks(
    fn: Callable[..., T],
    size: int,
    *args: object,
    deadline_s: float = ...,
    backend: str = ...,
    init: bool = ...,
    env: Mapping[str, str] | None = ...,
    expect_failures: Literal[True],
) -> list[Outcome[T]]: ...
def run_ranks(
    fn: Callable[..., T],
    size: int,
    *args: object,
    deadline_s: float = 60.0,
    grace_s: float = 5.0,
    backend: str = "gloo",
    init: bool = True,
    env: Mapping[str, str] | None = None,
    expect_failures: bool = False,
) -> list[T] | list[Outcome[T]]:
    """`fn(rank, size, *args)` on `size` real processes; gives their results in the order of ranks.

    Each rank sees the environment that torchrun would set, over this process's own, with `env` on top.
    init:            opens the default process group before `fn` and closes it after; False leaves that to `fn`.
    deadline_s:      for a machine that is free; five times as much is waited.
    grace_s:         how long the others may go on once a rank has failed.
    expect_failures: gives every rank's Outcome and raises nothing; the ranks have until the deadline, no grace.
    Raises: RankFailed; DeadlineExceeded with the stacks of those who had not finished. No process outlives the call.
    """
    __tracebackhide__ = True
    deadline_s *= PATIENCE
    store = own_store()
    tag = new_tag()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        orders = [
            _Order(
                rank=rank,
                folder=folder,
                function=_reference(fn),
                arguments=pickle.dumps((rank, size, *args)),
                environment={**os.environ, **_rank_environment(rank, size, store.port), **(env or {}), TAG: tag},
                cwd=os.getcwd(),
                deadline_s=deadline_s,
                backend=backend if init else None,
            )
            for rank in range(size)
        ]
        outcomes: list[Outcome[T]] = _run_to_the_end(orders, tag, None if expect_failures else grace_s)
    if expect_failures:
        return outcomes
    if any(outcome.error_type and not _is_cut(outcome) for outcome in outcomes):
        raise RankFailed(outcomes)
    if any(map(_is_cut, outcomes)):
        raise DeadlineExceeded(f"not all of {size} ranks finished within {deadline_s:g} s", outcomes)
    return [cast("T", outcome.value) for outcome in outcomes]


@dataclass(frozen=True)
class Completed:
    returncode: int
    output: str  # stdout and stderr of all its processes


def own_store() -> dist.TCPStore:
    """A store that this process hosts, at a port that is really bound: one that nobody else can take.

    It listens by IPv4 only: else it asks a name server for the name of 127.0.0.1, and stands still until it answers.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno()
        )
        listener.detach()
    return store


def free_port() -> int:
    """A port that nobody listens at; no connection is given it by chance either, as it is below those for that."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(15_000, 32_000))) as server:
            return int(server.getsockname()[1])


def torchrun(
    script: str | Path, nproc: int, *args: str, deadline_s: float = 120.0, env: Mapping[str, str] | None = None
) -> Completed:
    """The script on `nproc` ranks of this host under the real torchrun. Raises: see `run_command`."""
    return run_command(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={nproc}",
        str(script),
        *args,
        deadline_s=deadline_s,
        env=env,
    )


def run_python(
    script: str | Path, *args: str, deadline_s: float = 120.0, env: Mapping[str, str] | None = None
) -> Completed:
    """The script in one bare process; `run_python("-m", "package")` works too. Raises: see `run_command`."""
    return run_command(sys.executable, str(script), *args, deadline_s=deadline_s, env=env)


def run_command(*command: str, deadline_s: float, env: Mapping[str, str] | None = None) -> Completed:
    """Run to the end, then kill whatever it left running, in its own session or in another.

    `deadline_s` is for a machine that is free; five times as much is waited.

    Raises: DeadlineExceeded, with the output so far and the Python stacks; not for a return code other than 0.
    """
    __tracebackhide__ = True
    deadline_s *= PATIENCE
    tag = new_tag()
    is_late = False
    with tempfile.TemporaryFile() as log:  # a pipe would stay open as long as any descendant lives
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **(env or {}), TAG: tag},
        )
        try:
            process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            is_late = True
            # faulthandler prints the stacks. One by one, else their lines mix; torchrun, the eldest, first:
            # it would stop its workers.
            for pid in sorted(find_processes(tag=tag)):
                _signal(pid, signal.SIGABRT)
                time.sleep(0.2)
        finally:
            kill_processes(lambda: find_processes(tag=tag))
            process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    if is_late:
        raise DeadlineExceeded(f"still running after {deadline_s:g} s: {' '.join(command)}\n{output}")
    return Completed(process.returncode, output)


# ---- in the parent ----


def _run_to_the_end(orders: list["_Order"], tag: str, grace_s: float | None) -> list[Outcome[T]]:
    processes = [start_server().Process(target=_rank_main, args=(order,)) for order in orders]
    started = time.monotonic()
    try:
        for process in processes:
            process.start()
        ended = _wait(processes, orders[0].deadline_s, grace_s)
    finally:
        begun = [process for process in processes if process.pid is not None]
        for process in begun:
            if process.exitcode is None:
                process.kill()  # may not have reached its own session yet
        kill_processes(lambda: find_processes(tag=tag, sessions={process.pid for process in begun}))
        for process in begun:
            process.join(10.0)
    return [
        _outcome(order, process, started, ended.get(order.rank))
        for order, process in zip(orders, processes, strict=True)
    ]


def _wait(processes: list[ForkServerProcess], deadline_s: float, grace_s: float | None) -> dict[int, float]:
    """When each rank ended, by itself; those missing were still running at the deadline."""
    ended: dict[int, float] = {}
    deadline = time.monotonic() + deadline_s
    while len(ended) < len(processes) and time.monotonic() < deadline:
        running = [process for rank, process in enumerate(processes) if rank not in ended]
        ready = wait([process.sentinel for process in running], deadline - time.monotonic())
        for rank, process in enumerate(processes):
            if process.sentinel in ready:
                ended[rank] = time.monotonic()
                if process.exitcode != 0 and grace_s is not None:
                    deadline = min(deadline, ended[rank] + grace_s)
    return ended


def _outcome(order: "_Order", process: ForkServerProcess, started: float, ended: float | None) -> Outcome[T]:
    answer = _Answer(at=ended or time.monotonic())
    with suppress(FileNotFoundError):
        answer = pickle.loads(order.path("answer").read_bytes())
    output, stacks = (
        path.read_text(errors="replace") if path.exists() else ""
        for path in (order.path("output"), order.path("stacks"))
    )
    error_type, message, trace = answer.error_type, answer.error_message, answer.traceback
    if ended is None and error_type is None:
        error_type, message = "DeadlineExceeded", "still running, so the harness killed it"
        trace = stacks or "(no stack: it was cut before the deadline, it had only begun, or it was stopped)\n"
    elif process.exitcode != 0 and error_type is None:
        error_type, message = "ProcessDied", f"ended with exit code {process.exitcode} and no exception"
    return Outcome(
        order.rank,
        cast("T | None", answer.value),
        error_type,
        message,
        trace,
        process.exitcode or 0,
        answer.at - started,
        output,
    )


def _is_cut(outcome: Outcome[T]) -> bool:
    return outcome.error_type == "DeadlineExceeded"


def _report(outcome: Outcome[T]) -> str:
    lines = outcome.output.splitlines()[-OUTPUT_LINES:]
    return "\n".join(
        [
            f"\n---- rank {outcome.rank} after {outcome.seconds:.1f} s: {outcome.error_type}: {outcome.error_message}",
            outcome.traceback,
            f"---- rank {outcome.rank} printed",
            *lines,
        ]
    )


def _rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # else rank 0 would host a store on our store's port


def _reference(fn: Callable[..., T]) -> tuple[str, str, str]:
    """File, module name and qualified name of a module-level function."""
    file = getattr(sys.modules.get(fn.__module__), "__file__", None)
    if file is None or "<" in fn.__qualname__:
        raise TypeError(
            f"{fn.__module__}.{fn.__qualname__} cannot be found again in another process; "
            "move it to the top level of its module and give its inputs as arguments of run_ranks."
        )
    return str(Path(file).resolve()), fn.__module__, fn.__qualname__


@functools.cache
def start_server() -> ForkServerContext:
    """One fork server per pytest process. Waits until it has loaded torch, so that no deadline pays for that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in PRELOAD if _imports(name)])
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a broken module would take the server down; let it fail in the test that wants it
        return False
    return True


# ---- in a rank ----


@dataclass(frozen=True)
class _Order:
    """All that a rank is told: plain data, so that it can be read before the test module is loaded."""

    rank: int
    folder: str
    function: tuple[str, str, str]
    arguments: bytes
    environment: dict[str, str]
    cwd: str
    deadline_s: float
    backend: str | None  # None: `fn` opens the process group itself

    def path(self, kind: str) -> Path:
        return Path(self.folder, f"{kind}.{self.rank}")


@dataclass(frozen=True)
class _Answer:
    """What a rank hands back, through a file of its own: whole or absent, whenever the rank is killed."""

    at: float  # time.monotonic() is one clock for all processes of a host
    value: object = None
    error_type: str | None = None
    error_message: str = ""
    traceback: str = ""


def _rank_main(order: _Order) -> None:
    _settle(order)
    try:
        answer = pickle.dumps(_Answer(value=_call(order), at=time.monotonic()))
    except BaseException as error:
        answer = pickle.dumps(
            _Answer(
                error_type=type(error).__name__,
                error_message=str(error),
                traceback=traceback.format_exc(),
                at=time.monotonic(),
            )
        )
        _write(order, answer)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once, like a crash: leftover threads must not keep it, and its peers see its connections close.
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
    _write(order, answer)


def _settle(order: _Order) -> None:
    """Be the process that torchrun would have started, in a session and with output of its own."""
    os.setsid()
    output = os.open(order.path("output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True)  # a killed rank loses no line
    os.environ.clear()  # the server's: older than a test's monkeypatch.setenv
    os.environ.update(order.environment)
    os.chdir(order.cwd)
    torch.set_num_threads(1)
    # A forked rank would start its data loader's workers by a server of its own, each of which imports all anew.
    multiprocessing.set_start_method("fork", force=True)
    faulthandler.enable()  # a crash in native code says where
    faulthandler.dump_traceback_later(
        order.deadline_s - min(1.0, order.deadline_s / 4), file=order.path("stacks").open("w")
    )
    signal.alarm(math.ceil(order.deadline_s) + 10)  # the last resort: ends us when pytest itself was killed


def _call(order: _Order) -> object:
    file, module_name, name = order.function
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    arguments = pickle.loads(order.arguments)  # only now: they may be of classes of that module
    if order.backend is not None:
        dist.init_process_group(order.backend, timeout=timedelta(seconds=min(30.0 * PATIENCE, order.deadline_s / 2)))
        dist.barrier()  # else a rank that needs no peer may be gone while the others still connect to it
    value = operator.attrgetter(name)(module)(*arguments)
    if order.backend is not None and dist.is_initialized():  # not in a `finally`: a failed rank leaves like a crash
        dist.destroy_process_group()
    return value


def _write(order: _Order, answer: bytes) -> None:
    faulthandler.cancel_dump_traceback_later()
    unfinished = order.path("unfinished")
    unfinished.write_bytes(answer)
    unfinished.rename(order.path("answer"))


# ---- processes ----


def new_tag() -> str:
    """Begins with the tag of this process, so that looking for ours finds all started from here on."""
    return f"{os.environ.get(TAG, '')}/{uuid.uuid4().hex}"


def find_processes(*, tag: str, sessions: Collection[int | None] = (), parents: Collection[int] = ()) -> dict[int, str]:
    """Living processes, with their command lines: started with this tag, in these sessions, or descended from any.

    The tag finds those who changed session and lost their parent; the session those who were forked, not executed.
    """
    is_ours: set[int] = set()
    parent_of: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            state, parent, _, session = folder.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            if state in "ZX":
                continue
            pid = int(folder.name)
            parent_of[pid] = int(parent)
            if int(session) in sessions or f"{TAG}={tag}".encode() in folder.joinpath("environ").read_bytes():
                is_ours.add(pid)
    while more := {pid for pid, parent in parent_of.items() if parent in is_ours.union(parents)} - is_ours:
        is_ours |= more
    return {pid: _command_line(pid) for pid in is_ours}


def kill_processes(find: Callable[[], Collection[int]]) -> None:
    """SIGKILL all that `find` gives until it gives none: they may be starting others meanwhile."""
    end = time.monotonic() + 10.0
    while (pids := find()) and time.monotonic() < end:
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.01)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(ended)"
