"""Record windows of iterations as traces of torch.profiler."""

import os
from pathlib import Path
from typing import Any

import torch

from dengine.atomic_files import write_file
from dengine.checks import path_of, whole_number
from dengine.distributed import world
from dengine.engine import Engine, Events
from dengine.handlers.arguments import check_engine
from dengine.handlers.priorities import Priority
from dengine.naming import shown

__all__ = ["Profiler"]


class Profiler:
    """Writes `{dir}/trace_{first}-{last}.json` for each window of iterations, on rank 0.

    Open a trace in https://ui.perfetto.dev or chrome://tracing. A window leaves out `wait` iterations of the run,
    records `warmup` iterations and throws them away (the first ones with a profiler are slow), and records `active`
    iterations; this is done `repeat` times. A window that the run's end or a failure cuts short is written with what
    it has. A file with its final name is complete.

    Attach it on every rank; on other ranks than 0 it does nothing. They wait in their next collective while rank 0
    writes. Cost: recording slows an iteration down, most with `with_stack`; outside of the windows next to nothing.

    Args:
        dir: the folder; it is made at the first window.
        repeat: the number of windows; 0 means as many as fit into the run.
        record_shapes, profile_memory, with_stack: as in `torch.profiler.profile`.

    Attributes:
        paths: the files that have been written so far.

    Raises:
        TypeError, ValueError: a count is wrong. OSError: (at the end of a window) the file cannot be written.

    Example:
        >>> import tempfile
        >>> from dengine import Engine
        >>> trainer = Engine(lambda engine, batch: torch.ones(9).sum())
        >>> profiler = Profiler(tempfile.mkdtemp(), wait=1, warmup=1, active=2)
        >>> profiler.attach(trainer)
        >>> state = trainer.run(range(10))
        >>> [path.name for path in profiler.paths]
        ['trace_3-4.json']
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        *,
        wait: int = 5,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
    ) -> None:
        self._dir = path_of("dir", dir)
        self._wait = whole_number("wait", wait, least=0)
        self._warmup = whole_number("warmup", warmup, least=0)
        self._active = whole_number("active", active, least=1)
        self._repeat = whole_number("repeat", repeat, least=0)
        self._options: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        self._profile: torch.profiler.profile | None = None
        self._iteration = 0  # the last one that ended
        self._iterations_left = 0
        self.paths: list[Path] = []

    def __repr__(self) -> str:
        return shown(
            self, str(self._dir), wait=self._wait, warmup=self._warmup, active=self._active, repeat=self._repeat
        )

    def attach(self, engine: Engine) -> None:
        """Record the runs of `engine`.

        Raises: TypeError: `engine` is not an Engine.
        """
        check_engine(self, engine)
        if world().rank != 0:
            return
        engine.on(Events.STARTED, self._start, priority=Priority.TRACE_END)
        engine.on(Events.ITERATION_COMPLETED, self._step, priority=Priority.TRACE_END)
        engine.on(Events.COMPLETED | Events.EXCEPTION_RAISED, self._stop, priority=Priority.TRACE_END)

    def _start(self, engine: Engine) -> None:
        self._stop(engine)  # a run that was left without an event, by a failing handler of STARTED
        self._iteration = engine.state.iteration
        window = self._wait + self._warmup + self._active
        self._iterations_left = window * self._repeat
        profile = torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=self._wait, warmup=self._warmup, active=self._active, repeat=self._repeat
            ),
            on_trace_ready=self._write,
            **self._options,
        )
        profile.start()
        self._first = self._iteration + self._wait + self._warmup + 1
        self._profile = profile

    def _step(self, engine: Engine) -> None:
        if self._profile is None:
            return
        self._iteration = engine.state.iteration
        self._profile.step()
        self._iterations_left -= 1
        if self._iterations_left == 0:
            self._stop(engine)

    def _stop(self, engine: Engine) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()

    def _write(self, profile: torch.profiler.profile) -> None:
        if self._iteration < self._first:  # the run ended before the window had an iteration
            return
        path = self._dir / f"trace_{self._first}-{self._iteration}.json"
        self._first += self._wait + self._warmup + self._active
        write_file(path, lambda temporary: profile.export_chrome_trace(str(temporary)))
        self.paths.append(path)
