"""What the engine adds to an iteration: dengine, a bare loop, a hand-written floor, and PyTorch-Ignite side by side.

A step that does nothing, over a range of numbers. All contestants take turns, many rounds in one process; the best
round of each counts, as everything else is the machine's noise. Printed are nanoseconds per iteration *above the bare
loop* of the same round's best, and the ratio to dengine.

    python benchmarks/loop.py [--iterations N] [--rounds R]
"""

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

import dengine
from dengine import Engine, Events


def nothing(engine: Any, batch: int) -> int:
    return batch


def ignored(engine: Any) -> None:
    pass


def bare(num_iterations: int) -> None:
    for batch in range(num_iterations):
        nothing(None, batch)


def floor(num_iterations: int) -> None:
    """The same duties by hand: counts, batch and output kept on a state, a flag that ends the loop."""

    class Position:
        iteration = epoch_iteration = 0
        batch = output = None
        is_over = False

    state = Position()
    for iteration, batch in enumerate(range(num_iterations), start=1):
        state.batch = batch
        state.iteration = state.epoch_iteration = iteration
        state.output = nothing(None, batch)
        if state.is_over:
            break


def with_dengine(num_handlers: int, **options: Any) -> Callable[[int], None]:
    def run(num_iterations: int) -> None:
        engine = Engine(nothing)
        for _ in range(num_handlers):
            event = Events.ITERATION_COMPLETED
            engine.on(event(**options) if options else event, ignored)
        engine.run(range(num_iterations))

    return run


def with_ignite(num_handlers: int, **options: Any) -> Callable[[int], None]:
    from ignite.engine import Engine as IgniteEngine
    from ignite.engine import Events as IgniteEvents

    def run(num_iterations: int) -> None:
        engine = IgniteEngine(nothing)
        for _ in range(num_handlers):
            event = IgniteEvents.ITERATION_COMPLETED
            engine.add_event_handler(event(**options) if options else event, ignored)
        engine.run(range(num_iterations))

    return run


def contestants() -> dict[str, Callable[[int], None]]:
    never = {"every": 10**9}
    found: dict[str, Callable[[int], None]] = {
        "bare loop": bare,
        "floor by hand": floor,
        "dengine": with_dengine(0),
        "dengine, 5 handlers that do not fire": with_dengine(5, **never),
        "dengine, 50 handlers that do not fire": with_dengine(50, **never),
        "dengine, 5 handlers that fire": with_dengine(5),
    }
    if find_spec("ignite"):
        found |= {
            "ignite": with_ignite(0),
            "ignite, 5 handlers that do not fire": with_ignite(5, **never),
            "ignite, 5 handlers that fire": with_ignite(5),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "The counts of this run")  # that some handlers never fire is what is measured
    runs = contestants()
    best_ns = dict.fromkeys(runs, float("inf"))
    for _ in range(options.rounds):
        for name, run in runs.items():
            started = time.perf_counter_ns()
            run(options.iterations)
            best_ns[name] = min(best_ns[name], (time.perf_counter_ns() - started) / options.iterations)
    print(f"dengine {dengine.__version__}, Python {platform.python_version()}, {platform.machine()}, ", end="")
    print(f"torch {torch.__version__}")
    print(f"{'':40} {'ns/iteration':>12} {'above bare':>12} {'x dengine':>12}")
    reference = best_ns["dengine"] - best_ns["bare loop"]
    for name, ns in best_ns.items():
        above = ns - best_ns["bare loop"]
        print(f"{name:40} {ns:12.1f} {above:12.1f} {above / reference:12.2f}")
    per_handler = (best_ns["dengine, 50 handlers that do not fire"] - best_ns["dengine"]) / 50
    print(f"one handler that does not fire: {per_handler:.2f} ns an iteration")
    if not find_spec("ignite"):
        print("PyTorch-Ignite is not installed, so it is not compared: pip install pytorch-ignite")


if __name__ == "__main__":
    main()
