"""What grows with the number of ranks: 64, 256, 1024 and 10 000 of them, simulated on one machine.

Each simulated rank runs dengine's own code. No rank trains: there are no tensors to send.

- `sampler`: the indices of one rank, of an epoch of a million samples; CPU time, as for the metrics.
- `metrics`: the end of an epoch with 32 metrics on one rank, without what the network takes (torch's fake process
  group): what all ranks' states are compared and packed with.
- `checkpoint`: one rank's share of the plan of a sharded folder: 900 tensors a rank, 8 stages of a pipeline, each
  sharded over its ranks. What ranks say of themselves is unpickled; the gathers themselves are not in it.
- `store`: all ranks as clients of one real store, a hundred or more in a process, each with the threads of its control
  plane: they meet, open the control plane, agree on a stop, leave, and are told of a failure. The time is that of all
  of them on the cores of this machine; the CPU time is that of the process that hosts the store.

Of more than `--most-threaded` ranks the control planes have no threads of their own: a process has one connection and
one thread for all of its ranks, which takes each through dengine's own steps in turn. What they ask the store for is
the same, without the heartbeats. No more than 20 processes are used.

    TORCH_CPP_LOG_LEVEL=ERROR python benchmarks/scaling.py [--ranks 64 256 1024 10000]
                                 [--cases sampler metrics checkpoint store] [--samples N] [--most-threaded N]
                                 [--plot FILE.svg]
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dengine.checkpoint.formats.sharded.files import METADATA
from dengine.checkpoint.formats.sharded.index import index_of
from dengine.checkpoint.formats.sharded.owners import Owners
from dengine.checkpoint.formats.sharded.report import (
    Entry,
    Layout,
    Report,
    Structure,
    digest_of,
    digest_of_reports,
)
from dengine.checkpoint.formats.sharded.saved import Table, open_saved, table_name, write_root
from dengine.comm import consistency
from dengine.comm.consistency import text_digest
from dengine.control import heartbeat
from dengine.control.channel import StoreEndpoint
from dengine.control.context import ControlContext
from dengine.control.control import Control
from dengine.control.run import Run, position
from dengine.distributed import ElasticSampler
from dengine.launch import rendezvous
from dengine.launch.env import Launch
from dengine.launch.store import open_store
from dengine.launch.world import World
from dengine.metrics.reduction.reduce import Reduction, State
from dengine.metrics.reduction.schema import schemas_of
from dengine.torch_internals import TCPStore

RANKS_A_PROCESS = 100  # of more, most of the time goes into looks at the stacks of all threads of a process
MOST_PROCESSES = 18  # of ranks, beside the store's and this one
BEGINNING = ("connect", "meet", "prepare", "open", "begin")
ENDS = (("stop", "leave"), ("fail", "abort"))  # each of ranks that have met anew
NOT_SHOWN = ("connect", "prepare", "begin")
PATIENCE_S = 600.0
POLL_S = 0.005
Row = dict[str, float]


# -- the sampler and the metrics: one rank of so many ------------------------------------------------------------


def sampler(num_ranks: int, options: argparse.Namespace) -> Row:
    drawn = ElasticSampler(range(options.samples), batch_size=32, num_replicas=num_ranks, rank=num_ranks - 1)
    first_s = median_s(lambda: next(iter(drawn)))
    return {"first index, ms": 1e3 * first_s, "all indices, ms": 1e3 * median_s(lambda: sum(1 for _ in drawn))}


def metrics(num_ranks: int, _: argparse.Namespace) -> Row:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    here = World(rank=0, size=num_ranks, backend="fake")
    states = [State(f"metric {number}", "counts", "sum", torch.ones(10, 10, dtype=torch.int64)) for number in range(32)]
    of_each_rank = [State("seconds", "seconds", "gather", torch.ones(1))]
    row = {}
    of_last = schemas_of([*states[:-1], replace(states[-1], is_seen=False)])
    for name, schemas in (("agree, once", schemas_of(states)), ("agree, if one differs", of_last)):
        vars(consistency)["gather_objects"] = partial(gathered, last=(schemas, None))
        row[f"{name}, ms"] = 1e3 * median_s(lambda: Reduction().agree(states, here), rounds=3)
    for name, reduced in (("reduce", states), ("reduce, a row a rank", states + of_each_rank)):
        reduction = Reduction()
        reduction.take(reduced)

        def reduce(reduction: Reduction = reduction, reduced: list[State] = reduced) -> None:
            reduction.reduce(reduced, here)

        row[f"{name}, ms"] = 1e3 * median_s(reduce)
    dist.destroy_process_group()
    return row


def gathered(value: object, here: World, last: object) -> list[Any]:
    """What a gather gives if the last rank compares `last`, and all others what this one does; without the network."""
    num_others = here.size - 2
    if isinstance(value, int):  # a digest
        texts = [pickle.dumps(value)] * (num_others + 1) + [pickle.dumps(text_digest([repr(last)]))]
    else:
        texts = [pickle.dumps(value), *[pickle.dumps(None)] * num_others, pickle.dumps(last)]
    return [pickle.loads(text) for text in texts]


def median_s(action: Callable[[], object], rounds: int = 5) -> float:
    """What `action` takes of the CPU, as the machine may have other work as well."""
    return statistics.median(seconds(action, time.process_time) for _ in range(rounds))


def seconds(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    action()
    return clock() - started


# -- the store: all ranks ----------------------------------------------------------------------------------------


class NoConnections:
    """In place of the connections of a group, which a rank without collectives has none of."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        self._woken.wait(timeout_s)
        self._woken.clear()
        return False

    def wake(self) -> None:
        self._woken.set()

    def nothing(self, *_: object, **__: object) -> None:
        pass

    watch_process = abort = stand_in = hang_up = close = nothing


class Ranks:
    """Some of the simulated ranks: those of one process. Each public method is one step that all ranks take."""

    def __init__(self, ranks: range, size: int, port: int) -> None:
        self.size, self.port = size, port
        self._pool = ThreadPoolExecutor(len(ranks))
        self._ranks = ranks
        self._name = ""
        self._stores: dict[int, Any] = {}
        self._contexts: dict[int, ControlContext] = {}
        self._planes: dict[int, Control] = {}
        self._runs: dict[int, Run] = {}

    def connect(self) -> None:
        self._stores = {rank: open_store(self._launch(rank), PATIENCE_S) for rank in self._ranks}

    def meet(self) -> None:
        rendezvous._store_of = lambda launch, timeout_s: self._stores[launch.rank]
        self._name = self._each(lambda rank: rendezvous.rendezvous(self._launch(rank), PATIENCE_S)[1])[0]
        self._stores = {}

    def prepare(self) -> None:
        self._contexts = {rank: self._context(rank) for rank in self._ranks}

    def open(self) -> None:
        self._planes = dict(zip(self._ranks, self._each(self._open), strict=True))

    def begin(self) -> None:
        self._runs = {
            rank: plane.begin_run(is_shared=True, where=lambda frames: []) for rank, plane in self._planes.items()
        }
        for rank, run in self._runs.items():
            run.started = position(1, 1 + rank % 3)

    def stop(self) -> None:
        if self.size // 2 in self._runs:
            self._runs[self.size // 2].request_stop("run", 1, "asked")
        self._wait_until(lambda: all(run.reason for run in self._runs.values()))  # which comes with the decision
        for run in self._runs.values():
            run.end()

    def leave(self) -> None:
        self._each(lambda rank: self._planes[rank].leave_together())
        self._each(lambda rank: self._planes[rank].close(is_failing=False))

    def fail(self) -> None:
        if self.size // 2 in self._runs:
            self._runs[self.size // 2].failed(ValueError("a sample is broken"))
        self._wait_until(lambda: all(plane.context.status.failure is not None for plane in self._planes.values()))

    def abort(self) -> None:
        self._wait_until(lambda: all(plane.context.status.is_aborted for plane in self._planes.values()))

    def _each(self, action: Callable[[int], Any]) -> list[Any]:
        return list(self._pool.map(action, self._ranks))

    def _launch(self, rank: int) -> Launch:
        return Launch("torchrun", rank, self.size, 0, 1, rank, "127.0.0.1", self.port)

    def _context(self, rank: int) -> ControlContext:
        here = World(rank=rank, size=self.size, node_rank=rank, launcher="torchrun")
        connections: Any = NoConnections()
        return ControlContext(here, self._endpoint(), connections, None, {})

    def _endpoint(self) -> Any:
        return StoreEndpoint("127.0.0.1", self.port, f"dengine/{self._name}", False)

    def _open(self, rank: int) -> Control:
        plane = Control(self._contexts[rank], PATIENCE_S)
        plane.start()
        return plane

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            time.sleep(POLL_S)


class LightRanks(Ranks):
    """Ranks whose control planes have no threads and no connections of their own: all those of a process share one."""

    _num_groups = 0

    def prepare(self) -> None:
        self._num_groups += 1
        self._shared = StoreEndpoint(
            "127.0.0.1", self.port, f"dengine/{self._name}/{self._num_groups}", False
        ).connect()
        super().prepare()

    def open(self) -> None:
        self._planes = {rank: Control(context, PATIENCE_S) for rank, context in self._contexts.items()}

    def leave(self) -> None:
        left = [self._pool.submit(plane.leave_together) for plane in self._planes.values()]
        self._wait_until(lambda: all(each.done() for each in left))

    def abort(self) -> None:
        period_s = max(0.02, self.size / 10_000)  # as the watchdog's
        while not all(plane.context.status.is_aborted for plane in self._planes.values()):
            time.sleep(period_s)
            for plane in self._planes.values():
                plane.resolve()

    def _endpoint(self) -> Any:
        return SharedEndpoint(self._shared)

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            for plane in self._planes.values():
                messages = plane.messages
                if messages.reader.check([f"message/{messages.number}"]):
                    plane.read(may_sleep=True)  # which need not sleep
                elif plane.context.here.rank == 0:
                    plane.read(may_sleep=False)  # it may have something to decide
                else:
                    break  # what one of a process has read, all have
            time.sleep(POLL_S)


class SharedEndpoint:
    is_hosted_by_rank_zero = False

    def __init__(self, store: Any) -> None:
        self._store = store

    def connect(self) -> Any:
        return self._store


def work(kind: type[Ranks], ranks: range, size: int, port: int, orders: Any) -> None:
    """Take the steps that the parent names, on these ranks, and report the end of each."""
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    counted = itertools.count(ranks[0])
    # Each rank is a host of its own: what those of one host say to each other does not grow with the number of ranks.
    vars(heartbeat)["identity"] = lambda: {"host": f"host {next(counted)}", "pid": os.getpid(), "start": ""}
    here = kind(ranks, size, port)
    while (step := orders.recv()) != "end":
        getattr(here, step)()
        orders.send(step)
    os._exit(0)  # the threads of the ranks that have failed are not waited for


def host_store(port: Any) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        own = listener.getsockname()[1]
        store = TCPStore("127.0.0.1", own, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        port.send(own)
        port.recv()
        del store
    os._exit(0)


def store(num_ranks: int, options: argparse.Namespace) -> Row:
    if num_ranks > options.most_threaded:
        return simulated(LightRanks, num_ranks, (*BEGINNING, *ENDS[0], *BEGINNING[2:], *ENDS[1]))
    rows = [simulated(Ranks, num_ranks, (*BEGINNING, *end)) for end in ENDS]
    return rows[1] | rows[0]


def simulated(kind: type[Ranks], size: int, steps: tuple[str, ...]) -> Row:
    context = multiprocessing.get_context("fork")
    to_host, hosts = context.Pipe()
    host = context.Process(target=host_store, args=(hosts,), daemon=True)
    host.start()
    port = to_host.recv()
    workers: dict[Any, Any] = {}  # by process: where it takes orders
    ranks_a_process = max(RANKS_A_PROCESS, math.ceil(size / MOST_PROCESSES))
    for first in range(0, size, ranks_a_process):
        mine, its = context.Pipe()
        ranks = range(first, min(first + ranks_a_process, size))
        process = context.Process(target=work, args=(kind, ranks, size, port, its), daemon=True)
        process.start()
        workers[process] = mine

    def all_take(step: str) -> None:
        for orders in workers.values():
            orders.send(step)
        for orders in workers.values():
            orders.recv()

    row: Row = {"descriptors of the store": 0}
    for step in steps:
        cpu_s = cpu_seconds(host.pid)
        taken_s = seconds(lambda step=step: all_take(step))  # type: ignore[misc]
        row["descriptors of the store"] = max(row["descriptors of the store"], len(os.listdir(f"/proc/{host.pid}/fd")))
        if step not in NOT_SHOWN:
            row |= {f"{step}, s": taken_s, f"{step}, s of the store's CPU": cpu_seconds(host.pid) - cpu_s}
    for process, orders in (*workers.items(), (host, to_host)):  # the store last
        orders.send("end")
        process.join()
    return row


def cpu_seconds(pid: int | None) -> float:
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def checkpoint(num_ranks: int, _: argparse.Namespace) -> Row:
    """The first save of up to 8 stages; the second, which finds that nothing has changed; the size of their index; the
    root of the folder, and what a rank reads of it at a load before it opens the documents that it needs."""
    num_stages = min(8, num_ranks)
    structures = [stage_structure(stage, num_ranks // num_stages) for stage in range(num_stages)]
    digests = list(map(digest_of, structures))
    reports = [
        Report(digests[rank % num_stages], ((bytes([rank % num_stages]) * 8, rank // num_stages),))
        for rank in range(num_ranks - num_ranks % num_stages)
    ]
    texts = list(map(pickle.dumps, reports))
    known = dict(zip(digests, structures, strict=True))

    def first() -> str:
        owners = Owners([pickle.loads(text) for text in texts], known)
        owners.written_by(len(reports) - 1)
        return json.dumps(index_of(owners))

    second_s = median_s(lambda: (digest_of(structures[0]), digest_of_reports([pickle.loads(text) for text in texts])))
    index = first()
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(num_ranks):
            Path(folder, table_name(rank)).touch()
        write_root(Path(folder), [Table(1, "0" * 64, 0)] * num_ranks, json.loads(index), {})
        return {
            "first save, s": median_s(first, rounds=3),
            "second save, s": second_s,
            "index, bytes a tensor": len(index) / (900 * num_stages),
            "root, MB": Path(folder, METADATA).stat().st_size / 1e6,
            "reading the root, s": median_s(lambda: open_saved(Path(folder)), rounds=3),
        }


def stage_structure(stage: int, num_ranks: int) -> Structure:
    part, names = f"pp={stage}", [f"layer{number}.weight" for number in range(900)]
    entries = tuple(Entry(f"model/{name}", (8192, 1024), "bfloat16", part, 0) for name in names)
    return Structure(
        entries, (Layout(0, (num_ranks,), (0,), (), "Shard(0)"),), tuple((("model", n), part) for n in names)
    )


# -- all of it ---------------------------------------------------------------------------------------------------

# By name: gives what it has measured for a number of ranks.
CASES: dict[str, Callable[[int, argparse.Namespace], Row]] = {
    "sampler": sampler,
    "metrics": metrics,
    "checkpoint": checkpoint,
    "store": store,
}


def measured(case: str, num_ranks: int, options: argparse.Namespace) -> Row:
    """The row of a case, measured in a process of its own."""
    mine, its = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=lambda: its.send(CASES[case](num_ranks, options)))
    process.start()
    its.close()
    row: Row = mine.recv()
    process.join()
    return row


def print_row(case: str, num_ranks: int, row: Row) -> None:
    print(f"{case}, {num_ranks} ranks: " + "; ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


def plot(tables: dict[str, dict[int, Row]], file: str) -> None:
    """One picture a case, both axes logarithmic. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(tables), 4), layout="constrained")
    for axes, (case, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        for name in next(iter(rows.values())):
            if name.endswith("s"):
                axes.plot(list(rows), [row.get(name, math.nan) for row in rows.values()], marker="o", label=name)
        axes.set(xscale="log", yscale="log", title=case, xlabel="ranks")
        axes.legend(fontsize="x-small")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 10_000])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--samples", type=int, default=1_000_000, help="of an epoch")
    parser.add_argument("--most-threaded", type=int, default=2048, help="control planes with threads of their own")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture of it, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["RES_OPTIONS"] = (
        "attempts:0"  # torch asks the name server about each client of a store: here nobody does
    )
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}")
    tables: dict[str, dict[int, Row]] = {}
    for case in options.cases:
        tables[case] = {}
        for num_ranks in options.ranks:
            tables[case][num_ranks] = measured(case, num_ranks, options)
            print_row(case, num_ranks, tables[case][num_ranks])
    if options.plot:
        plot(tables, options.plot)


if __name__ == "__main__":
    main()
