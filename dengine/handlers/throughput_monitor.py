"""Measure the speed of a run, and the time that each part of an iteration takes."""

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from dengine.checks import number
from dengine.comm.waits import listen
from dengine.distributed import all_reduce, world
from dengine.engine import Absent, Engine, Events
from dengine.engine.handler_checks import collective
from dengine.handlers.arguments import check_engine, check_function
from dengine.handlers.ddp_phases import DDPPhases
from dengine.handlers.peaks import peak_flops_per_s
from dengine.handlers.phase_clock import SUMS, PhaseClock, stamps_for
from dengine.handlers.priorities import Priority
from dengine.handlers.straggler import find_straggler
from dengine.metrics.core.batch_size import samples_or_one
from dengine.naming import shown
from dengine.parallel.ddp_buckets import models_in_ddp
from dengine.types import summable

__all__ = ["ThroughputMonitor"]

_LEFT_OUT = (Absent, type(None))  # batches of which there is nothing to count
_COUNTED_STEP = 2  # the first one of a run may compile


class ThroughputMonitor:
    """Measures a run. It adds to `state.metrics` after each epoch, and prints as one line on rank 0:

    - `samples_per_s`, and `tokens_per_s` if `num_tokens` is given: of all ranks together;
    - `data_ms`, `step_ms`, `handlers_ms`: the mean time that an iteration waits for the batch, spends in the step, and
      in everything else, metrics included; each the largest of all ranks;
    - `mfu`, the model FLOPs utilisation: the floating-point operations of the steps, as `torch.utils.flop_counter`
      counts those of one step of this rank (its second one, forward and backward), divided by what its device could
      have done in the epoch's time.

    With several ranks it also names the one that the others wait for, in `engine.state.straggler` (None if they are
    even) and in the line; `straggler_rank` and `straggler_s`, the seconds a step, are then among the metrics. Each
    rank measures its own time, without its waits: for DDP's sums, for rank 0's buffers, and in collectives of this
    package; on a GPU by events. A rank is named if it takes longer than the median of the others by 5 % of a step and
    by six standard errors over the steps of the epoch; the first step of a run does not count. Its phase is "data"
    (the wait for the batch), "forward" (from the beginning of the step), "backward", "step" (what comes after it: the
    optimizer) or "handlers" (with metrics). Without a model in DDP the parts of a step are not known, and its phase is
    "step". Waits in other collectives (FSDP, tensor parallelism, pipelines, `torch.distributed` itself) cannot be told
    from work, so that there a rank is named for its data or handlers only.

    The times are those of the loop. A GPU works asynchronously: the loop waits for it only if its queue is full or a
    value is read, so only the sum of the times, and the throughput, are those of the device. The monitor itself does
    not wait for it, except at the end of an epoch.

    Attach it on every rank. Collective, unless the engine is one rank's own. Cost: two all-reduces of a few numbers an
    epoch, five readings of a clock an iteration, and one step under the counter. With several ranks: 72 bytes more of
    each in the first of these, ten more readings, or events of the GPU, and 2 hooks on a model in DDP.

    Args:
        num_samples: `(engine) -> int`, the samples of an iteration; by default the first dimension of the batch's
            target, or the one that its tensors have in common; 1 if neither is known.
        num_tokens: `(engine) -> int or 0-d tensor`, the tokens of this rank; a tensor is not read before the epoch's
            end. On a mesh, samples and tokens that several ranks share count once.
        count_flops: False leaves `mfu` out, and counts nothing.
        peak_flops_per_s: of one device, dense, in the precision of the training; by default from a table of GPUs in
            16 bits. If neither is known, as on a CPU, there is no `mfu`.
        print_line: False leaves the line out.

    Example:
        >>> from dengine import Engine
        >>> trainer = Engine(lambda engine, batch: None)
        >>> ThroughputMonitor(print_line=False).attach(trainer)
        >>> metrics = trainer.run([torch.zeros(8, 2)] * 3).metrics
        >>> sorted(metrics)
        ['data_ms', 'handlers_ms', 'samples_per_s', 'step_ms']
    """

    def __init__(
        self,
        num_samples: Callable[[Engine], int] | None = None,
        num_tokens: Callable[[Engine], float | torch.Tensor] | None = None,
        *,
        count_flops: bool = True,
        peak_flops_per_s: float | None = None,
        print_line: bool = True,
    ) -> None:
        check_function("num_samples", num_samples, "engine")
        check_function("num_tokens", num_tokens, "engine")
        if peak_flops_per_s is not None:
            peak_flops_per_s = number("peak_flops_per_s", peak_flops_per_s, "a number above 0", above=0)
        self._num_samples = num_samples or _samples_of_batch
        self._num_tokens = num_tokens
        self._counts_flops = count_flops
        self._peak = peak_flops_per_s
        self._prints = print_line
        self._counter: Any = None
        self._flops_a_step: int | None = None
        self._samples: Any = 0
        self._tokens: Any = 0
        self._clock: PhaseClock | None = None  # of a run over several ranks
        self._phases: DDPPhases | None = None
        self._start_epoch()

    def __repr__(self) -> str:
        return shown(self, num_samples=self._num_samples, num_tokens=self._num_tokens)

    def attach(self, engine: Engine) -> None:
        """Measure the runs of `engine`. Its clock is read after all handlers of one event and before those of the
        next.
        """
        check_engine(self, engine)
        engine.on(Events.STARTED, self._begin_run, priority=Priority.CLOCK_LAST)
        engine.on(Events.EPOCH_STARTED, self._begin, priority=Priority.CLOCK_LAST)
        engine.on(Events.GET_BATCH_STARTED, self._fetch, priority=Priority.CLOCK_LAST)
        engine.on(Events.GET_BATCH_COMPLETED, self._fetched, priority=Priority.CLOCK_FIRST)
        engine.on(Events.ITERATION_STARTED, self._step_begins, priority=Priority.CLOCK_LAST)
        engine.on(Events.ITERATION_COMPLETED, self._step_ended, priority=Priority.CLOCK_FIRST)
        engine.on(Events.ITERATION_COMPLETED, self._iteration_over, priority=Priority.CLOCK_LAST)
        engine.on(Events.EPOCH_COMPLETED, self._report, priority=Priority.VALUES)
        engine.on(Events.EXCEPTION_RAISED, self._stop_counting, priority=Priority.CLOCK_FIRST)
        ends = Events.TERMINATED | Events.COMPLETED | Events.EXCEPTION_RAISED
        engine.on(ends, self._end_run, priority=Priority.CLOCK_FIRST)

    # -- handlers ------------------------------------------------------------------------------------------------

    def _begin_run(self, engine: Engine) -> None:
        self._end_run(engine)  # of a run that was left by an error of a handler
        if engine.distributed and world().size > 1:
            self._clock = PhaseClock(stamps_for(world().device))
            self._phases = DDPPhases(models_in_ddp(), self._clock)
            listen(self._clock, is_on=True)

    def _begin(self, engine: Engine) -> None:
        self._start_epoch()

    def _fetch(self, engine: Engine) -> None:
        self._fetch_s = perf_counter()
        if self._clock is not None:
            self._clock.begin_step()

    def _fetched(self, engine: Engine) -> None:
        self._data_s += perf_counter() - self._fetch_s
        if self._clock is not None:
            self._clock.switch("handlers")

    def _step_begins(self, engine: Engine) -> None:
        is_wanted = self._counts_flops and self._flops_a_step is None and engine.state.iteration >= _COUNTED_STEP
        if is_wanted and type(engine.state.batch) not in _LEFT_OUT and self._peak_of(engine) is not None:
            from torch.utils.flop_counter import FlopCounterMode  # costs 0.3 s to import

            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        self._step_s = perf_counter()
        if self._clock is not None:
            self._clock.begin_call()

    def _step_ended(self, engine: Engine) -> None:
        self._in_step_s += perf_counter() - self._step_s
        if self._clock is not None:
            self._clock.switch("handlers")
        if self._counter is not None:
            self._flops_a_step = int(self._counter.get_total_flops())
            self._stop_counting(engine)
        if type(engine.state.batch) in _LEFT_OUT:
            return
        self._num_steps += 1
        self._samples = self._samples + summable(self._num_samples(engine))
        if self._num_tokens is not None:
            self._tokens = self._tokens + summable(self._num_tokens(engine))

    def _iteration_over(self, engine: Engine) -> None:
        if self._clock is not None:
            self._clock.end_step()

    def _end_run(self, engine: Engine) -> None:
        if self._clock is not None and self._phases is not None:
            listen(self._clock, is_on=False)
            self._phases.remove()
        self._clock = self._phases = None

    def _stop_counting(self, engine: Engine) -> None:
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)

    @collective
    def _report(self, engine: Engine) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # work still queued counts
        elapsed_s = max(perf_counter() - self._started_s, 1e-9)
        metrics = self._values(engine, elapsed_s)
        for name in ("straggler_rank", "straggler_s"):
            engine.state.metrics.pop(name, None)  # of the epoch before
        engine.state.metrics.update(metrics)
        if self._prints and world().rank == 0:
            print(_line(engine, metrics), file=sys.stderr, flush=True)

    # -- numbers -------------------------------------------------------------------------------------------------

    def _start_epoch(self) -> None:
        self._started_s = self._fetch_s = self._step_s = perf_counter()
        self._data_s = self._in_step_s = 0.0
        self._num_steps = 0
        self._samples = self._tokens = 0
        if self._clock is not None:
            self._clock.start_epoch()

    def _peak_of(self, engine: Engine) -> float | None:
        return self._peak if self._peak is not None else peak_flops_per_s(world().device)

    def _values(self, engine: Engine, elapsed_s: float) -> dict[str, float]:
        peak = self._peak_of(engine)
        sums = {
            "samples": float(self._samples),
            "tokens": float(self._tokens),
            "flops": float((self._flops_a_step or 0) * self._num_steps),
            "peaks": peak or 0.0,
        }
        num = max(engine.state.epoch_iteration, 1)
        times = {
            "elapsed_s": elapsed_s,
            "data_ms": 1e3 * self._data_s / num,
            "step_ms": 1e3 * self._in_step_s / num,
            "handlers_ms": 1e3 * max(elapsed_s - self._data_s - self._in_step_s, 0.0) / num,
        }
        here = world()
        ranks = torch.zeros(here.size, len(SUMS), dtype=torch.float64)  # each rank fills its own row
        if self._clock is not None:
            self._clock.read()
            ranks[here.rank] = torch.tensor(self._clock.sums(), dtype=torch.float64)
        if engine.distributed:
            # Each counts once: the ranks of `cp` have the same samples, but each its own tokens.
            sums["tokens"] *= here.counts_samples
            sums["samples"] *= here.counts_samples and here.coordinates.get("cp", 0) == 0
            sums, ranks = all_reduce((sums, ranks), "sum", name="the throughput of an epoch")
            times = all_reduce(times, "max", name="the times of an epoch")
        elapsed_s = times.pop("elapsed_s")
        values = {"samples_per_s": sums["samples"] / elapsed_s}
        if self._num_tokens is not None:
            values["tokens_per_s"] = sums["tokens"] / elapsed_s
        values.update(times)
        if sums["flops"] and sums["peaks"]:
            values["mfu"] = sums["flops"] / (elapsed_s * sums["peaks"])
        straggler = engine.state.straggler = find_straggler(ranks.tolist())
        if straggler is not None:
            values.update(straggler_rank=straggler.rank, straggler_s=straggler.seconds)
        return values


def _samples_of_batch(engine: Engine) -> int:
    return samples_or_one(engine.state.batch)


def _line(engine: Engine, metrics: dict[str, float]) -> str:
    parts = [f"epoch {engine.state.epoch + 1}: {metrics['samples_per_s']:.4g} samples/s"]
    if "tokens_per_s" in metrics:
        parts.append(f"{metrics['tokens_per_s']:.4g} tokens/s")
    times = (f"{name} {metrics[f'{name}_ms']:.3g}" for name in ("data", "step", "handlers"))
    parts.append(f"ms an iteration: {', '.join(times)}")
    if "mfu" in metrics:
        parts.append(f"MFU {100 * metrics['mfu']:.1f} %")
    if (straggler := engine.state.straggler) is not None:
        place = world().place_of(straggler.rank)
        rank = f"rank {straggler.rank}" + (f" ({place})" if place else "")
        parts.append(f"{1e3 * straggler.seconds:.3g} ms of it waiting for {rank}, slow in {straggler.phase}")
    return ", ".join(parts)
