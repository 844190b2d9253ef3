"""The loop: one short function per level (run, epochs, epoch, iterations, pass). It knows no policy; every policy is a
handler."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from dengine.control.run import END, position
from dengine.data.parts import failures_of
from dengine.distributed import all_reduce, world
from dengine.engine import epoch_metrics
from dengine.engine.data.description import PassPosition, described
from dengine.engine.data.epochs import EpochIterator
from dengine.engine.data.joined import Absent
from dengine.engine.dispatch import Dispatcher
from dengine.engine.events import Events
from dengine.engine.handler_list import NEVER
from dengine.engine.limits import Limits
from dengine.engine.position import loops_here
from dengine.engine.resume import Resuming
from dengine.engine.start import compare_start
from dengine.engine.state import State
from dengine.metrics.collection.metric_set import MetricSet
from dengine.naming import describe

if TYPE_CHECKING:
    from dengine.engine.engine import Engine

__all__ = ["Loop", "ProcessFunction", "engines_around"]

ProcessFunction: TypeAlias = "Callable[[Engine, Any], Any]"


@dataclass(eq=False)
class Loop:
    """One run of an engine. Its attributes end with the run; `engine.state` outlives it."""

    engine: Engine
    state: State
    step: ProcessFunction
    dispatcher: Dispatcher
    metrics: MetricSet
    resuming: Resuming
    epochs: EpochIterator
    limits: Limits

    def __post_init__(self) -> None:
        self._iteration_lists = tuple(
            self.dispatcher.handlers(event)
            for event in (
                Events.GET_BATCH_STARTED,
                Events.GET_BATCH_COMPLETED,
                Events.ITERATION_STARTED,
                Events.ITERATION_COMPLETED,
            )
        )
        self.limits.run.begin_at(self.state.iteration)
        # Iteration number minus count of the event in this run, for the events that count fetches.
        self._fetch_started_offset = self._fetch_completed_offset = self.state.iteration
        self._consumed_before = self.state.iteration  # batches that the interrupted run had taken of an iterator
        self._num_left_out = 0  # batches of None in this epoch
        self._continued: Iterator[object] | None = None  # the batches of a pass that the epoch before did not end

    def run(self) -> None:
        """Run from start to end. A failure is reported to the other ranks first, since they wait."""
        state, started_s = self.state, time.perf_counter()
        try:
            self.run_epochs(started_s)
            epoch_metrics.end_live(state, is_read=True)
        except BaseException as error:
            self._leave_by(error)
            raise
        finally:
            state.times["run"] = time.perf_counter() - started_s
            state.batch = None
            # After a failure nothing is read: a device may have failed, or wait for a lost rank.
            epoch_metrics.end_live(state, is_read=False)
            self.limits.run.end()
            self.resuming.end_run()

    def run_epochs(self, started_s: float) -> None:
        """Run the epochs that are left, between `STARTED` and `COMPLETED`."""
        state, distributed = self.state, self.engine.distributed
        if distributed:
            compare_start(self)
        is_fresh = state.iteration == 0
        self._fire(Events.STARTED)
        max_epochs = NEVER if state.max_epochs is None else state.max_epochs
        while state.epochs_completed < max_epochs and self._run_epoch():
            pass
        self.resuming.return_between_epochs(self.epochs)  # if there was nothing left to do
        state.times["run"] = time.perf_counter() - started_s
        if self.limits.is_terminated:
            self._fire(Events.TERMINATED)
        if not state.preempted:
            self._fire(Events.COMPLETED)
        is_whole = is_fresh and not self.limits.is_terminated
        if is_whole and (world().rank == 0 or not distributed) and self._is_evaluation():
            self.dispatcher.warn_of_idle(state)

    def _is_evaluation(self) -> bool:
        """Whether the run looks like that of an evaluator: one whole epoch, or part of one inside a trainer's run.

        Several epochs, or a few iterations, may be a trial of a longer training.
        """
        is_cut = self.epochs.is_length_given or self.limits.max_iterations != NEVER
        return self.state.max_epochs == 1 and not (is_cut and not engines_around(self.engine))

    def _run_epoch(self) -> bool:
        """Run one epoch, or the rest of it. False if it was cut short, so that the run is over."""
        state, limits = self.state, self.limits
        started_s = time.perf_counter()
        # A state that a handler of EPOCH_STARTED takes goes on after this event, as with every other event.
        is_new = state.epoch < state.epochs_completed or state.iteration == 0
        if is_new and state.iteration >= limits.max_iterations:
            return False
        if not limits.may_begin(position(state.epochs_completed, 0 if is_new else state.epoch_iteration)):
            return False
        if is_new:
            state._epoch, state._epoch_iteration = state.epochs_completed, 0
            self.resuming.return_between_epochs(self.epochs)
        self._num_left_out = 0
        self.metrics.reset()
        state.metrics = self.metrics.shown_live(state.metrics)
        if is_new:
            self._fire(Events.EPOCH_STARTED)
        elif self.engine.distributed and (saved := self.resuming.saved()) is not None:
            epoch_metrics.restore(self.metrics, saved, state.epoch)
        has_ended = self._run_iterations()
        state.batch = None
        if state.epoch_iteration:
            limits.run.note_batches(state.epoch)
        may_end = limits.may_begin(position(state.epoch, END))
        if not has_ended or not may_end:
            return False
        self._end_epoch(started_s, is_whole=is_new)
        return True

    def _end_epoch(self, started_s: float, *, is_whole: bool) -> None:
        state, run, distributed = self.state, self.limits.run, self.engine.distributed
        self.epochs.keep_workers()
        # The epoch's end has started by now: a rank without a batch does not delay a stop.
        if not state.epoch_iteration and not run.must_check and not run.has_any_rank_batches(state.epoch):
            self.epochs.emptiness.refuse_empty_epoch(state.epoch, state.iteration)
        if (guard := self.engine.repeats.guard) is not None:
            guard.flush(self.engine)
        if self._num_left_out and self._num_left_out == state.epoch_iteration:
            self._warn_of_none()
        if not self.limits.is_skipped():
            state.metrics.update(epoch_metrics.compute(self.metrics, distributed=distributed, is_whole=is_whole))
            if failures_of(self.epochs.data) and "data_errors" not in self.metrics.names:
                errors = float(state.data_errors)
                errors = all_reduce(errors, "sum", name="the number of data errors") if distributed else errors
                state.metrics["data_errors"] = errors
        state._epochs_completed = state.epoch + 1
        self.resuming.end_epoch(self.epochs)
        state.times["epoch"] = time.perf_counter() - started_s
        self._fire(Events.EPOCH_COMPLETED)

    def _warn_of_none(self) -> None:
        state = self.state
        warnings.warn(
            f"All {state.epoch_iteration} batches of epoch {state.epoch} were None on rank {world().rank}, so that "
            f"{describe(self.step)} was never called: None is a batch of which nothing is left. Check the collate_fn "
            "and on_error=; for iterations without data, run over range(n).",
            RuntimeWarning,
            stacklevel=2,
        )

    def _run_iterations(self) -> bool:
        """Iterate until the epoch ends (True) or is cut short, by `max_iterations` or `terminate()` (False)."""
        state, limits, epochs = self.state, self.limits, self.epochs
        epoch_start = state.iteration - state.epoch_iteration
        batches = self._continued
        if batches is None:
            self._enter_data()
        if epochs.length is not None:
            state._epoch_length = epochs.length
        if epochs.length == 0:
            epochs.emptiness.refuse_no_batch()
        end = NEVER if epochs.length is None else epoch_start + epochs.length
        limits.run.started = position(state.epoch, state.epoch_iteration + 1)
        if epochs.length == 0 and limits.may_go_on(NEVER):  # ranks with a batch may wait for a look at it
            epochs.looked_into(iter(()), state.epoch, state.iteration, is_start=False)
        if not limits.may_go_on(end):
            self.resuming.return_between_epochs(epochs)  # a run that was saved in the epoch's last iteration
            return limits.has_ended(end)
        self._announce_fetch()
        if batches is None:
            batches = self._first_batches()
        pass_start = state.iteration - state.pass_iteration
        while True:
            if not self._run_pass(batches):
                if not limits.may_go_on(end):
                    if state.iteration >= end:
                        epochs.finish(state.iteration - pass_start)
                    return limits.has_ended(end)
                self._announce_fetch()
            elif epochs.is_over(state.epoch, state.iteration, is_empty=state.iteration == pass_start):
                self._fetch_started_offset -= 1  # the last fetch was announced, but the data had ended
                if not epochs.is_length_given:
                    state._epoch_length = state.epoch_iteration
                self._continued = None
                return True
            else:
                pass_start = state.iteration
                batches = self._next_pass()

    def _run_pass(self, batches: Iterator[object]) -> bool:
        """Run the iterations of a pass over the data; every line here costs time in each of them. True if the data
        ended.
        """
        engine, state, step, metrics, limits = self.engine, self.state, self.step, self.metrics, self.limits
        run, gate = limits.run, self.dispatcher.gate
        get_batch_started, get_batch_completed, started, completed = self._iteration_lists
        iteration = state.iteration
        fetch_started_offset, fetch_completed_offset = self._fetch_started_offset, self._fetch_completed_offset
        for batch in batches:
            state.batch = batch
            iteration += 1
            if iteration < gate.due:
                state._iteration = iteration
            else:
                if iteration - fetch_completed_offset >= get_batch_completed.due:
                    get_batch_completed.fire(engine, iteration - fetch_completed_offset)
                state._iteration = iteration
                if iteration >= started.due:
                    started.fire(engine, iteration)
                batch = state.batch  # a handler may have set it
            if batch is None:
                state.output, state._left_out = None, iteration
                self._num_left_out += 1
            else:
                state.output = step(engine, batch)
            state._iterations_done = iteration
            if metrics.updates and batch is not None and type(state.batch) is not Absent:
                metrics.update(state.output)
            if iteration >= completed.due:
                completed.fire(engine, iteration)
            run.iteration = iteration  # published before other ranks ask: see control/stop.py
            if iteration >= run.stop_at:
                return False
            if iteration >= gate.due and iteration + 1 - fetch_started_offset >= get_batch_started.due:
                get_batch_started.fire(engine, iteration + 1 - fetch_started_offset)
        return True

    def _enter_data(self) -> None:
        """Enter the data of the epoch, or the pass over continued data that it begins in."""
        state, epochs = self.state, self.epochs
        epochs.enter(state.data_pass)
        if epochs.is_continued and epochs.is_at_end(state.pass_iteration):
            self._enter_next_pass()
        state.data_state = described(epochs.data, state.data_pass, state._pass)

    def _enter_next_pass(self) -> None:
        state = self.state
        self.epochs.enter(state.data_pass + 1)
        state._pass = PassPosition(state.data_pass + 1, state.iteration)
        state.data_state = described(self.epochs.data, state.data_pass, state._pass)

    def _next_pass(self) -> Iterator[object]:
        """The batches of another pass over the data, in the same epoch."""
        if not self.epochs.is_continued:
            return self.epochs.start()
        self._enter_next_pass()
        self.resuming.begin_pass(self.epochs)
        self._continued = batches = self.epochs.start()
        return batches

    def _first_batches(self) -> Iterator[object]:
        """The batches of the epoch from its present position on, with the random number generators as they were
        there.
        """
        state, consumed, self._consumed_before = self.state, self._consumed_before, 0
        batches = self.resuming.first_batches(self.epochs, skip=state.pass_iteration, consumed=consumed)
        # Else there was a batch already; there may be no more. Ranks may be at other iterations of a pass.
        is_start = not (state.iteration if self.epochs.is_continued else state.epoch_iteration)
        batches = self.epochs.looked_into(batches, state.epoch, state.iteration, is_start=is_start)
        self._continued = batches if self.epochs.is_continued else None
        return batches

    def _announce_fetch(self) -> None:
        handlers, count = self._iteration_lists[0], self.state.iteration + 1 - self._fetch_started_offset
        if count >= handlers.due:
            handlers.fire(self.engine, count)

    def _fire(self, event: Events) -> None:
        self.dispatcher.fire(self.engine, event)

    def _leave_by(self, error: BaseException) -> None:
        """Report `error` to the other ranks; then fire `EXCEPTION_RAISED`.

        Raises: the failure of another rank, if `error` is only a consequence of it.
        """
        raised = self.limits.run.failed(error)
        self.state.exception = raised
        self.dispatcher.handlers(Events.EXCEPTION_RAISED).fire_despite(self.engine, raised)
        if raised is not error:
            raise raised from None


def engines_around(engine: Engine) -> list[Engine]:
    """The engines whose handlers or steps contain the present run of `engine`, the innermost first."""
    inner_first = [loop.engine for loop in loops_here(Loop.run_epochs.__code__)]
    here = [index for index, each in enumerate(inner_first) if each is engine]
    return inner_first[here[-1] + 1 :] if here else []
