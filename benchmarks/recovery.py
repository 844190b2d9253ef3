"""Seconds from the SIGKILL of a rank to the first new step, and from the launch to the first one, part by part.

Two contestants take turns, each with two ranks on CPUs that train the same small model and save every fifth step:
dengine, under launch/elastic.sh, with `Checkpoint.resume`; and a bare script in DDP, under torchrun, that loads what
`torch.save` has written. On one node, and on two of one rank each: network namespaces, which need root.

The parts, each up to the last of the ranks:

- agent: it notices, ends the other rank, meets the other agents, and starts the processes (or is itself started);
- imports, from the start of a process; group; build: model and optimizer; load: the newest checkpoint; step: the first.

`lost`: how often it did not come back at all within two minutes.

    python benchmarks/recovery.py [--rounds R] [--nodes 1 2] [--kills K] [--width W]
"""

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ROOT / "tests_dist" / "hosts" / "hosts.sh"
PARTS = ("agent", "imports", "group", "build", "load", "step")
KINDS = ("dengine", "torch")
SIZE = 2
SAVE_EVERY = 5
PAUSE_S = 0.02  # of each step, so that a job does not take a core for itself
DEADLINE_S = 120.0
CANNOT = 77


def now_s() -> float:
    """The clock by which the kernel says when a process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# -- the ranks -----------------------------------------------------------------------------------------------------


class Log:
    """The file into which all ranks of a job write when a part was over; one write for each line."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "log"

    def mark(self, part: str) -> None:
        seconds = process_start_s() if part == "agent" else now_s()
        line = f"{os.getpid()} {os.environ['RANK']} {part} {seconds}\n".encode()
        number = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(number, line)
        os.close(number)

    def processes(self) -> dict[int, dict[str, float]]:
        """For each process so far, when its parts were over, and its "rank"."""
        found: dict[int, dict[str, float]] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                pid, rank, part, seconds = line.split()
                found.setdefault(int(pid), {"rank": float(rank)})[part] = float(seconds)
        return found


def process_start_s() -> float:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def layers(nn: Any, width: int) -> Any:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def train_with_dengine(folder: Path, width: int, log: Log) -> None:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from dengine import Engine, Events, distributed
    from dengine.handlers import Checkpoint

    log.mark("imports")
    with distributed.process_group():
        log.mark("group")
        model = distributed.prepare_model(layers(nn, width))
        optimizer = torch.optim.Adam(model.parameters())
        samples = TensorDataset(torch.ones(4096, width))
        loader = distributed.prepare_data_loader(DataLoader(samples, shuffle=True), global_batch_size=16 * SIZE)

        def step(engine: Engine, batch: list[torch.Tensor]) -> None:
            time.sleep(PAUSE_S)
            optimizer.zero_grad()
            model(batch[0]).square().mean().backward()
            optimizer.step()

        trainer = Engine(step)
        objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
        trainer.on(Events.ITERATION_COMPLETED(every=SAVE_EVERY), Checkpoint(objects, folder / "saved"))
        log.mark("build")
        Checkpoint.resume(folder / "saved", objects)
        log.mark("load")
        first = trainer.state.iteration + 1
        trainer.on(Events.ITERATION_COMPLETED(once=first), lambda engine: log.mark("step"))
        trainer.run(loader, max_epochs=10**6)


def train_bare(folder: Path, width: int, log: Log) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    log.mark("imports")
    dist.init_process_group("gloo")
    log.mark("group")
    model = DistributedDataParallel(layers(nn, width))
    optimizer = torch.optim.Adam(model.parameters())
    samples = TensorDataset(torch.ones(4096, width))
    loader = DataLoader(samples, batch_size=16, sampler=DistributedSampler(samples))
    log.mark("build")
    path, num_steps = folder / "saved.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        num_steps = state["num_steps"]
    log.mark("load")
    first = num_steps + 1
    while True:
        for (batch,) in loader:
            time.sleep(PAUSE_S)
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            num_steps += 1
            if num_steps == first:
                log.mark("step")
            if num_steps % SAVE_EVERY == 0 and dist.get_rank() == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "num_steps": num_steps}, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)


# -- the jobs ------------------------------------------------------------------------------------------------------


def commands_of(kind: str, folder: Path, width: int, on: list[list[str]]) -> list[tuple[list[str], dict[str, str]]]:
    """For each node its command and variables. `on`: for each node what leads to it, [] for this machine."""
    script = [str(Path(__file__)), "--rank-of", kind, "--folder", str(folder), "--width", str(width)]
    nodes, a_node = len(on), SIZE // len(on)
    head = "h1" if nodes > 1 else "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    if kind == "dengine":
        command = ["bash", str(ROOT / "launch" / "elastic.sh"), *script]
        values = {"NNODES": f"{nodes}:{nodes}", "HEAD": head, "PORT": port, "NPROC": str(a_node)}
        values |= {"DENGINE_VENV": sys.prefix, "RESTARTS": "100"}
    else:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}:{nodes}", "--max-restarts=100"]
        command += [f"--nproc-per-node={a_node}", "--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{port}", *script]
        # As launch/ does; torch 2.13 hangs at most restarts otherwise, in init_process_group().
        values = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return [([*lead, *command], values) for lead in on]


@contextmanager
def job(kind: str, folder: Path, width: int, on: list[list[str]]) -> Iterator[Log]:
    """A job that trains until the end of the block."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    output = (folder / "output").open("wb")
    running = [
        subprocess.Popen(
            command, env={**environment, **values}, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
        for command, values in commands_of(kind, folder, width, on)
    ]
    log = Log(folder)
    try:
        yield log
    finally:
        for each in running:
            each.terminate()
        for each in running:
            with suppress(subprocess.TimeoutExpired):
                each.wait(20)
        for pid in [*log.processes(), *(each.pid for each in running)]:  # what is left
            with suppress(OSError):  # it has ended
                if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        for each in running:
            each.wait()
        output.close()


def parts_since(began_s: float, log: Log, folder: Path) -> dict[str, float]:
    """Wait until all ranks that began since have done a step. Gives the seconds of each part, and their sum."""
    deadline_s = now_s() + DEADLINE_S
    while now_s() < deadline_s:
        # The kernel counts in hundredths of a second.
        new = [each for each in log.processes().values() if each.get("agent", 0.0) > began_s - 0.02]
        if sum("step" in each for each in new) == SIZE:
            ends = [began_s, *(max(each[part] for each in new if "step" in each) for part in PARTS)]
            parts = {part: end - begin for part, (begin, end) in zip(PARTS, pairwise(ends), strict=True)}
            return {**parts, "all": sum(parts.values())}
        time.sleep(0.02)
    raise TimeoutError(f"no step of all ranks in {DEADLINE_S:g} s:\n{(folder / 'output').read_text(errors='replace')}")


def measure(
    kind: str, folder: Path, width: int, on: list[list[str]], num_kills: int
) -> dict[str, list[dict[str, float]]]:
    """One job: its start, and each recovery from the kill of its last rank."""
    folder.mkdir()
    recoveries = []
    began_s = now_s()
    with job(kind, folder, width, on) as log:
        starts = [parts_since(began_s, log, folder)]
        for _ in range(num_kills):
            time.sleep(2 * SAVE_EVERY * PAUSE_S + 0.5)  # there is something to load
            pid = max(
                (pid for pid, each in log.processes().items() if each["rank"] == SIZE - 1),
                key=lambda pid: log.processes()[pid]["agent"],
            )
            began_s = now_s()
            os.kill(pid, signal.SIGKILL)
            try:
                recoveries.append(parts_since(began_s, log, folder))
            except TimeoutError as error:
                if kind == "dengine":
                    raise
                # Ranks that read what those before them left in the agent's store wait for each other.
                print(f"{kind} did not come back:\n{str(error)[-400:]}", file=sys.stderr)
                recoveries.append({})
                break
    return {"start": starts, "recovery": recoveries}


@contextmanager
def nodes(number: int, folder: Path) -> Iterator[list[list[str]] | None]:
    """What leads to each of so many nodes; None if this machine cannot have them."""
    if number == 1:
        yield [[]]
        return
    place = str(folder / "hosts")
    with (folder / "hosts.out").open("w") as output:
        code = subprocess.run([str(HOSTS), "up", place, str(number)], stdout=output, stderr=output).returncode
    if code:
        print(f"{number} nodes: {(folder / 'hosts.out').read_text().strip()}", file=sys.stderr)
        yield None
        return
    try:
        yield [[str(HOSTS), "exec", place, f"h{each + 1}"] for each in range(number)]
    finally:
        subprocess.run([str(HOSTS), "down", place], check=True, stdout=subprocess.DEVNULL)


def compare(number: int, options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """All measurements on so many nodes: by case, contestant and part."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        case: {kind: [] for kind in options.kinds} for case in ("start", "recovery")
    }
    with nodes(number, folder) as on:
        if on is None:
            return None
        if not options.no_warm_up:  # it writes the interpreter's caches
            for kind in options.kinds:
                measure(kind, folder / f"{kind}-warm-up", options.width, on, 0)
        for index in range(options.rounds):
            for kind in options.kinds[:: 1 - 2 * (index % 2)]:
                measured = measure(kind, folder / f"{kind}-{index}", options.width, on, options.kills)
                for case in found:
                    found[case][kind] += measured[case]
    return found


def table(
    number: int, found: dict[str, Any], summary: Callable[[list[float]], float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Print a line for each case and contestant; gives the values."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    for case, kinds in found.items():
        for kind, rows in kinds.items():
            came = [each for each in rows if each]
            row = {part: summary([each[part] for each in came]) for part in ("all", *PARTS)} if came else {}
            row["lost"] = len(rows) - len(came)
            values.setdefault(case, {})[kind] = row
            shown = "; ".join(f"{part} {seconds:.2f}" for part, seconds in row.items())
            print(f"{case}, {number} node{'s' * (number > 1)}, {kind}: {shown}", flush=True)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=2, help="of each job")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="the contestants")
    parser.add_argument(
        "--no-warm-up", action="store_true", help="count the round that writes the interpreter's caches"
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rank-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        log = Log(options.folder)
        log.mark("agent")
        (train_with_dengine if options.rank_of == "dengine" else train_bare)(options.folder, options.width, log)
        return
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}; {options.rounds} rounds; seconds"
    )
    lines: dict[str, Any] = {}
    for number in options.nodes:
        with tempfile.TemporaryDirectory(prefix="recovery") as folder:
            found = compare(number, options, Path(folder))
        if found is None:
            continue
        print("medians")
        medians = table(number, found, statistics.median)
        print("minima")
        lines[f"nodes_{number}"] = {"median": medians, "minimum": table(number, found, min)}
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
