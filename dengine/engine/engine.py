"""The engine, the public class: add handlers and metrics, start and leave a run, save its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from enum import Enum
from functools import partial
from typing import Any, TypeVar, overload

from dengine.checks import whole_number
from dengine.control.plane import plane
from dengine.distributed import world
from dengine.engine import foreign_names
from dengine.engine.data.epochs import EpochIterator
from dengine.engine.dispatch import Dispatcher, HandlerHandle
from dengine.engine.events import AnyEvent, Events, Subscribable
from dengine.engine.handler_checks import check_process_function
from dengine.engine.handler_list import Handler
from dengine.engine.limits import PREEMPTED, Limits
from dengine.engine.loop import Loop, ProcessFunction
from dengine.engine.phases import SavePhase
from dengine.engine.position import levels
from dengine.engine.repeats import Repeats
from dengine.engine.resume import Resuming, passes_of
from dengine.engine.start import checked_data, checked_limits
from dengine.engine.state import State
from dengine.metrics.collection.metric_set import AnyMetric, MetricSet
from dengine.metrics.core.metric import OutputTransform
from dengine.naming import other_keywords, other_names, shown
from dengine.random_state import RandomState
from dengine.types import Stateful

__all__ = ["Engine", "ProcessFunction"]

_H = TypeVar("_H", bound=Handler)


@other_names(**foreign_names.ENGINE)
class Engine:
    """Runs `process_function(engine, batch)` over data and fires events; handlers attach to them.

    Args:
        process_function: one step. What it returns is `state.output`. It is not called for a batch of None (of which a
            `collate_fn` has left nothing): that is an iteration with all its events, but without an output, of which
            metrics see nothing.
        distributed: False makes the engine this rank's own (an evaluation on rank 0 only): its metrics are not
            reduced, its stops are its own, and it takes part in no collective.
        joined: over several ranks, one with fewer batches than others takes part in the last iterations, and one with a
            batch of None in that iteration, with an `Absent` as `state.batch`, so that a step may hold collectives
            (DDP, FSDP). Metrics are not updated in these iterations. Only data with a length end together. Cost: one
            small all-reduce an epoch.
        stop_every: iterations of an epoch that belong together (an accumulation of gradients): `terminate()`,
            `terminate_epoch()` and `preempt()` leave after a multiple of this number, or at the epoch's end.

    Raises:
        TypeError: `process_function` cannot be called as `process_function(engine, batch)`; the message shows its
            signature.
        TypeError, ValueError: `stop_every` is no whole number of at least 1.

    Example:
        >>> trainer = Engine(lambda engine, batch: 2 * batch)
        >>> @trainer.on(Events.ITERATION_COMPLETED(every=2))
        ... def show(engine):
        ...     print(engine.state.iteration, engine.state.output)
        >>> state = trainer.run([1, 2, 3, 4])
        2 4
        4 8
    """

    def __init__(
        self,
        process_function: ProcessFunction,
        *,
        distributed: bool = True,
        joined: bool = False,
        stop_every: int = 1,
    ) -> None:
        check_process_function(process_function)
        self.state = State()
        self.distributed = distributed
        self.is_trainer = False  # True: in a run of one epoch inside another engine's, too, its own iterations count
        self.firing: AnyEvent | None = None  # the event whose handlers are running
        self.save_phase = SavePhase()  # of that event
        self.repeats = Repeats(self)
        self.rank_states: dict[str, Stateful] = {}  # more that each rank has for itself, saved with the engine
        self._step = process_function
        self._is_joined = joined and distributed
        self._stop_every = whole_number("stop_every", stop_every, least=1)
        self._metrics = MetricSet()
        self._dispatcher = Dispatcher(Events)
        self._resuming = Resuming()
        self._loop: Loop | None = None  # of the run under way

    def __repr__(self) -> str:
        """The settings of the engine. The position of its run is in the repr of its state."""
        return shown(
            self,
            self._step,
            metrics=self.metric_names or None,
            distributed=None if self.distributed else False,
            joined=self._is_joined or None,
            stop_every=self._stop_every if self._stop_every > 1 else None,
        )

    # -- events --------------------------------------------------------------------------------------------------

    @overload
    def on(
        self, event: Subscribable, handler: None = None, *, priority: int = 0, rank_zero_only: bool = False
    ) -> Callable[[_H], _H]: ...

    @overload
    def on(
        self, event: Subscribable, handler: Handler, *, priority: int = 0, rank_zero_only: bool = False
    ) -> HandlerHandle: ...

    def on(
        self,
        event: Subscribable,
        handler: Handler | None = None,
        *,
        priority: int = 0,
        rank_zero_only: bool = False,
    ) -> HandlerHandle | Callable[[_H], _H]:
        """Attach a handler: `handler(engine)` is called at `event`. Without a handler, this is a decorator.

        Handlers with a higher `priority` come first; within one priority, they are called in the order of registration,
        except that a `Checkpoint` comes last: it saves what the others have done. A handler that is attached while its
        event is being fired is called from the next time on.

        Args:
            event: an event, one with options (`Events.X(every=100)`), or several joined by `|`.
            rank_zero_only: call it on rank 0 alone. A collective of this package inside it raises
                `RankZeroCollectiveError` instead of waiting for ever.

        Returns:
            A handle whose `remove()` detaches the handler; the decorator returns the function unchanged.

        Raises:
            TypeError: the handler cannot be called as `handler(engine)`, or `event` is no event.
            ValueError: the event is not registered.
        """
        if handler is not None:
            return self._dispatcher.attach(event, handler, priority=priority, rank_zero_only=rank_zero_only)
        self._dispatcher.parts(event)  # an event that is not registered is refused at once

        def attach(function: _H) -> _H:
            self.on(event, function, priority=priority, rank_zero_only=rank_zero_only)
            return function

        return attach

    def register_events(self, *events: type[Enum] | Enum | str) -> None:
        """Register events of your own for `on` and `fire_event`: enum classes, single members, or strings.

        Raises:
            TypeError: one is not an event; nothing is registered then.
        """
        self._dispatcher.register(*events)

    def fire_event(self, event: AnyEvent) -> None:
        """Run the handlers of `event` now.

        Raises:
            ValueError: the event is not registered; the message lists the registered ones and names the closest.
            TypeError: an event with options was given: options belong to `on`.
        """
        if not isinstance(event, (Enum, str)):
            raise TypeError(
                f"fire_event() takes a bare event, but got {event!r}; options such as every= belong to on()."
            )
        self._dispatcher.fire(self, event)

    def before_save(self) -> None:
        """Call the handlers of any event that are to look at what is about to be saved. A `Checkpoint` calls it before
        each save, and saves nothing if one of them raises: `ConsistencyCheck(model, before_saving=True)`.

        Collective as they are: call it on all ranks.
        """
        for handler in self._dispatcher.before_saves():
            handler(self)

    # -- metrics -------------------------------------------------------------------------------------------------

    def add_metric(self, metric: AnyMetric, name: str, output_transform: OutputTransform | None = None) -> None:
        """Compute `metric` over each epoch, as `state.metrics[name]`.

        It is reset when an epoch starts, updated with each step's output, and computed before the handlers of
        `EPOCH_COMPLETED`, over the samples of all ranks. Cost: all metrics of an engine share one all-reduce an epoch.

        Args:
            output_transform: turns the step's output into what `update` takes; for metrics that have none of their
                own (torchmetrics').

        Raises:
            TypeError: `metric` has no `reset`, `update` and `compute`, or the name is no string.
            ValueError: the name is taken, the metric has an `output_transform` already, or it would count twice:
                another engine that is alive has it, or a metric of this one has it inside.
        """
        self._metrics.add_all({name: metric}, output_transform)

    def add_metrics(self, metrics: Mapping[str, AnyMetric]) -> None:
        """Add each metric of `{name: metric}`; on an error, none is added."""
        self._metrics.add_all(metrics)

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics, also of those that have no value yet."""
        return self._metrics.names

    # -- running -------------------------------------------------------------------------------------------------

    @other_keywords(**foreign_names.RUN)
    def run(
        self,
        data: Iterable[object],
        max_epochs: int | None = 1,
        *,
        max_iterations: int | None = None,
        epoch_length: int | None = None,
        continue_data: bool = False,
        allow_changed_data: bool = False,
    ) -> State:
        """Run over `data` until `max_epochs` or `max_iterations` is reached, whichever comes first.

        The run starts at epoch 0 and iteration 0, unless `load_state_dict()` was called since the last run: then it
        goes on from there, also in the middle of an epoch (whose `EPOCH_STARTED` does not fire again).

        Args:
            data: any iterable; each epoch iterates over it from its start. A one-shot iterator goes on from its
                position; a resumed run needs a new one at its beginning, which it fast-forwards.
            max_epochs: the total number, of which a resumed run does the rest; None: only `max_iterations` counts.
            max_iterations: the total over all epochs, within `max_epochs` (1 if it is not given). An epoch that it
                cuts short is not completed: no `EPOCH_COMPLETED`, no metrics.
            epoch_length: iterations of an epoch; by default `len(data)`, or until the data end. If it is more than the
                data have, they are iterated again; if less, each epoch takes the first batches, unless the data are
                continued.
            continue_data: with `epoch_length`, each epoch goes on through the data where the one before ended: every
                sample comes once a pass, whatever the length of an epoch. Data with a `set_epoch` are told the number
                of the pass (`state.data_pass`), and workers go on over the end of an epoch. A resumed run may have
                another `epoch_length`.
            allow_changed_data: go on although the length of the data, or the global batch or the seed of a prepared
                loader, differs from that at the start of the run; without it, that is a ValueError.

        Returns:
            `engine.state`.

        Raises:
            TypeError, ValueError: an argument is wrong (nothing was changed then), or there is no batch (with several
                ranks one may have an empty shard, as long as another rank has a batch in that epoch).
            LaunchError: a launcher started several processes, but no process group is open.
            ConsistencyError: ranks differ in what must be the same: metrics, models, prepared data, collective
                handlers, the first batch of ranks that share their data.
            RuntimeError: this engine is running already, or a one-shot iterator ran dry.
            Any exception of a step, a handler or the data, after `EXCEPTION_RAISED`.
            RemoteRankError, StallError: another rank failed, vanished or hangs; the message says which one, and
                its position.

        Cost: over several ranks, one all-reduce of 5 numbers at the start (the comparison), one more if no rank
        knows the length of its data, and one all-reduce an epoch if there are metrics. On a mesh whose ranks share
        data, and for data that nobody has cut into shards here, one more at the start, for the first batch, which is
        read for it.
        """
        self._refuse_while_running("run()")
        max_epochs, max_iterations = checked_limits(max_epochs, max_iterations)
        epochs = checked_data(
            data, epoch_length, continue_data, is_joined=self._is_joined, distributed=self.distributed
        )
        self._resuming.check_data(self.state, epochs, allow_changed_data=allow_changed_data)
        self._loop = self._new_loop(epochs, max_epochs, max_iterations)
        try:
            self._loop.run()
        finally:
            self._loop = None
        return self.state

    # -- leaving a run ---------------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """Leave the run after the current iteration, on every rank after the same one. Without a run it does nothing.

        Call it on any rank, or on several. If another rank has started a further iteration by then, all ranks do that
        one, too: that is one or two if steps wait for each other (DDP), else as many as fit into some milliseconds. If
        the run ends before that anyway, nothing changes.
        """
        if self._loop is not None:
            self._loop.limits.run.request_stop("run", self.state.epoch)

    def preempt(self) -> None:
        """Leave the run as `terminate()` does, for a job that will be resumed later.

        `state.preempted` is true, on every rank, from `TERMINATED` on, and `COMPLETED` does not fire. `Preemption`
        calls this.
        """
        if self._loop is not None:
            self._loop.limits.run.request_stop("run", self.state.epoch, reason=PREEMPTED)

    def terminate_epoch(self) -> None:
        """Leave the epoch after the current iteration, on every rank after the same one. The epoch counts as completed.

        Called in `EPOCH_STARTED`, it skips the epoch's iterations; outside an epoch it does nothing. Otherwise it works
        as `terminate`.
        """
        if self._loop is not None and self._loop.limits.run.started >= 0:  # not in STARTED
            self._loop.limits.run.request_stop("epoch", self.state.epoch)

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position of the run, as plain numbers, strings, lists and dicts.

        An iteration that is still under way (in its step, or in `ITERATION_STARTED`) counts as not started, so that a
        resumed run does it again.
        """
        return self.state.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Make the next `run()` go on from the position in `state_dict`.

        Raises:
            ValueError: an entry is wrong, missing or unknown (the message names it); the engine is unchanged.
            RuntimeError: the engine is running.
        """
        self._refuse_while_running("load_state_dict()")
        self.state.load_state_dict(state_dict)
        self._resuming.is_resumed = True

    def random_state(self) -> RandomState:
        """The part of the state that each rank has for itself, which a resumed run needs.

        It holds the random number generators, as they are now and as they were when the epoch's iterator started, and
        the states of the metrics in this epoch. It is made of tensors, numbers, strings, lists and dicts. A
        `Checkpoint` saves that of every rank.
        """
        return {
            **self._resuming.state(self.state),
            "data_state": deepcopy(self.state.data_state),
            "metrics": self._metrics.state_dict() if self.distributed else [],
            "world_size": world().size,
            **(
                {"more": {name: each.state_dict() for name, each in self.rank_states.items()}}
                if self.rank_states
                else {}
            ),
        }

    def load_random_state(self, random_state: RandomState, *, data_only: bool = False) -> None:
        """Make the next `run()` of this rank go on with the generators and metrics that `random_state()` gave.

        Args:
            data_only: it is the state of another rank, so that only the number of passes over the data is used.

        Raises:
            RuntimeError: the engine is running.
        """
        self._refuse_while_running("load_random_state()")
        self._resuming.load(passes_of(random_state) if data_only else random_state)
        more = {} if data_only else random_state.get("more", {})
        for name in self.rank_states.keys() & more.keys():
            self.rank_states[name].load_state_dict(more[name])

    def data_restored(self, objects: Iterable[object]) -> None:
        """Note that `objects` have restored their own position, so that the next `run()` does not fast-forward them.

        That holds for data that are one of `objects`, or iterate over one. `Checkpoint.resume` calls it with all
        objects that it has loaded.

        Raises:
            RuntimeError: the engine is running.
        """
        self._refuse_while_running("data_restored()")
        self._resuming.data_restored(objects)

    # -- parts of a run --------------------------------------------------------------------------------------------

    def _new_loop(self, epochs: EpochIterator, max_epochs: int | None, max_iterations: int | None) -> Loop:
        """Set the state and the counts of events to those of the start of a run, and give its loop."""
        run = plane().begin_run(is_shared=self.distributed, where=partial(levels, Loop.run_epochs.__code__))
        limits = Limits(self.state, run, max_iterations=max_iterations, stop_every=self._stop_every)
        self.state._begin_run(epochs.data, max_epochs, epochs.length, is_resumed=self._resuming.is_resumed)
        self._resuming.begin_run(epochs)
        self._dispatcher.rewind()
        return Loop(
            engine=self,
            state=self.state,
            step=self._step,
            dispatcher=self._dispatcher,
            metrics=self._metrics,
            resuming=self._resuming,
            epochs=epochs,
            limits=limits,
        )

    def _refuse_while_running(self, call: str) -> None:
        if self._loop is not None:
            raise RuntimeError(f"{call} was called while this engine is running: use a second Engine inside a handler.")
