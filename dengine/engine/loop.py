"""The engine: one short function per level of the loop. It knows no policy; every policy is a handler."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from enum import Enum
from functools import partial
from typing import Any, TypeAlias, TypeVar, overload

from dengine.checks import whole_number
from dengine.control.stop import END, Run, begin_run, position
from dengine.distributed import rank_zero_only as only_on_rank_zero
from dengine.distributed import world
from dengine.engine.data import Absent, Feed, check_data
from dengine.engine.dispatch import (
    NEVER,
    Channel,
    Dispatcher,
    Handler,
    HandlerHandle,
    Subscription,
    check_handler,
    check_process_function,
    warn_of_idle,
)
from dengine.engine.events import AnyEvent, Events, Subscribable, event_parts
from dengine.engine.position import frames_here, levels, running
from dengine.engine.resuming import Resuming, passes_of
from dengine.engine.start import must_be_alike, samples_if_whole, warn_of_whole_data
from dengine.engine.state import State
from dengine.errors import NotComputableError
from dengine.launch.world import refuse_forgotten_group
from dengine.metrics.collection.live import MetricValues
from dengine.metrics.collection.metric_set import AnyMetric, MetricSet
from dengine.metrics.core.metric import OutputTransform
from dengine.naming import other_keywords, other_names, shown
from dengine.random_state import RandomState
from dengine.types import MetricValue

__all__ = ["Engine", "ProcessFunction", "engines_around"]

ProcessFunction: TypeAlias = "Callable[[Engine, Any], Any]"
_H = TypeVar("_H", bound=Handler)

# The loop counts these itself; every other event is counted by its channel.
_PER_ITERATION = (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
_PER_EPOCH = (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
_PREEMPTED = "preempted"  # as the reason why a run is left


@other_names(
    add_event_handler="write engine.on(event, handler); a handler is called as handler(engine)",
    add_event_handlers="write engine.on(event, handler) for each",
    remove_event_handler="engine.on(event, handler) gives a handle, whose remove() detaches the handler",
    has_event_handler="keep the handle that engine.on(event, handler) gives",
    attach=(
        "a metric is added by engine.add_metric(metric, name); a handler with an attach() is attached by "
        "handler.attach(engine), any other one by engine.on(event, handler)"
    ),
    add_callback="write engine.on(event, handler)",
    event_filter="write engine.on(Events.X(filter=function), handler)",
    max_iters="write engine.run(data, max_iterations=...)",
    fit="write engine.run(data, max_epochs=...)",
    train="write engine.run(data, max_epochs=...)",
    validate="make a second Engine, an evaluator, and write evaluator.run(data)",
    test="make a second Engine, an evaluator, and write evaluator.run(data)",
    evaluate="make a second Engine, an evaluator, and write evaluator.run(data)",
    predict="make a second Engine, whose step gives the predictions, and write it.run(data)",
    set_data="pass the data to engine.run(data)",
    interrupt="engine.terminate() leaves the run; a state_dict() goes on from there",
    current_epoch="it is engine.state.epoch, from 0",
    global_step="it is engine.state.iteration",
)
class Engine:
    """Runs `process_function(engine, batch)` over data and fires events; handlers attach to them.

    Args:
        process_function: one step. What it returns is `state.output`.
        distributed: False makes the engine this rank's own (an evaluation on rank 0 only): its metrics are not
            reduced, its stops are its own, and it takes part in no collective.
        joined: ranks whose data ends before that of others take part in the iterations that they lack, with an
            `Absent` as `state.batch`, so that a step may hold collectives (DDP, FSDP). Metrics are not updated in them.
            Of data that has a length. Cost: one small all-reduce an epoch.
        stop_every: iterations of an epoch that belong together (an accumulation of gradients): `terminate()`,
            `terminate_epoch()` and `preempt()` leave behind a multiple of so many, or at the epoch's end.

    Raises:
        TypeError: `process_function` cannot be called as `process_function(engine, batch)`; it names its signature.
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
        self.firing: AnyEvent | None = None  # the event whose handlers are running
        # What is to be saved behind the handlers of the event that this one is fired in; None: at once.
        self.saves_later: list[Callable[[], None]] | None = None
        self._step = process_function
        self._is_joined = joined and distributed
        self._stop_every = whole_number("stop_every", stop_every, least=1)
        self._metrics = MetricSet()
        self._dispatcher = Dispatcher()
        self.register_events(Events)
        self._loop_channels = tuple(
            self._dispatcher.channel(event)
            for event in (
                Events.GET_BATCH_STARTED,
                Events.GET_BATCH_COMPLETED,
                Events.ITERATION_STARTED,
                Events.ITERATION_COMPLETED,
            )
        )
        self._is_resumed = False
        self._is_terminated = False
        self._run: Run | None = None  # the run under way, as the ranks agree about it
        self._max_iterations = NEVER
        self._iterations_done = 0  # state.iteration counts one that is still under way
        # The loop leaves the epoch where `iteration >= _stop_at`, whoever wants it to: one comparison for all.
        self._stop_at = NEVER
        # Iteration number minus count of the event in this run, for the events that count fetches.
        self._fetch_started_offset = 0
        self._fetch_completed_offset = 0
        self._consumed_before = 0  # batches that the interrupted run had taken of a one-shot iterator
        self._resuming = Resuming()

    def __repr__(self) -> str:
        """What it is; where its run stands is in the repr of its state."""
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
        """Have `handler(engine)` called at `event`; without a handler, a decorator that does so.

        Higher `priority` first, registration order within one priority, but for a `Checkpoint`, which comes last in
        its priority: it saves what the others have done. Attached while its event is being fired, a handler is called
        from the next firing on.

        Args:
            event: an event, one with options (`Events.X(every=100)`), or several joined by `|`.
            rank_zero_only: call it on rank 0 alone; a collective of this package inside it raises
                `RankZeroCollectiveError` instead of waiting for ever.

        Returns:
            A handle whose `remove()` detaches the handler; the decorator returns the function unchanged.

        Raises:
            TypeError: the handler cannot be called as `handler(engine)`, or `event` is no event.
            ValueError: the event is not registered.
        """
        channels = [(self._dispatcher.channel(part.event), part) for part in event_parts(event)]
        if handler is None:

            def attach(function: _H) -> _H:
                self.on(event, function, priority=priority, rank_zero_only=rank_zero_only)
                return function

            return attach
        check_handler(handler)
        if isinstance(priority, bool) or not isinstance(priority, (int, float)):
            raise TypeError(f"priority={priority!r} must be a number.")
        called: Handler = only_on_rank_zero(handler) if rank_zero_only else handler
        attached = [(channel, Subscription(called, part, priority)) for channel, part in channels]
        for channel, subscription in attached:
            channel.add(subscription)
        return HandlerHandle(attached)

    def register_events(self, *events: type[Enum] | Enum | str) -> None:
        """Let `on` and `fire_event` accept events of your own: enum classes, single members, or strings.

        Raises:
            TypeError: something else was given; nothing is registered then.
        """
        members: list[AnyEvent] = []
        for event in events:
            if isinstance(event, type) and issubclass(event, Enum):
                members.extend(event)
            elif isinstance(event, (Enum, str)):
                members.append(event)
            else:
                raise TypeError(f"register_events() takes enum classes, enum members or strings, but got {event!r}.")
        for member in members:
            self._dispatcher.register(member)

    def fire_event(self, event: AnyEvent) -> None:
        """Run the handlers of `event` now.

        Raises:
            ValueError: the event is not registered; the message lists those that are and names the closest.
            TypeError: an event with options was given: options belong to `on`.
        """
        if not isinstance(event, (Enum, str)):
            raise TypeError(
                f"fire_event() takes a bare event, but got {event!r}; options such as every= belong to on()."
            )
        self._fire(self._dispatcher.channel(event))

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
        self._metrics.add(name, metric, output_transform)

    def add_metrics(self, metrics: Mapping[str, AnyMetric]) -> None:
        """`add_metric` for each of `{name: metric}`; all of them or, on an error, none."""
        self._metrics.add_all(metrics)

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics, also of those that have no value yet."""
        return self._metrics.names

    # -- running -------------------------------------------------------------------------------------------------

    @other_keywords(
        max_iters="it is called max_iterations=",
        max_steps="it is called max_iterations=",
        epochs="it is called max_epochs=",
        num_epochs="it is called max_epochs=",
        seed="seed the generators before, as by torch.manual_seed(seed)",
    )
    def run(
        self,
        data: Iterable[Any],
        max_epochs: int | None = 1,
        *,
        max_iterations: int | None = None,
        epoch_length: int | None = None,
        allow_changed_data: bool = False,
    ) -> State:
        """Run over `data` until `max_epochs` or `max_iterations` is reached, whichever comes first.

        Starts afresh (epoch 0, iteration 0), unless `load_state_dict()` was called since the last run: then it goes
        on from there, in the middle of an epoch where that is where it was (whose `EPOCH_STARTED` has been and does
        not fire again).

        Args:
            data: any iterable; each epoch iterates over it anew. A one-shot iterator goes on where it is.
                To a resumed run it is given anew, at its beginning, and wound forward.
            max_epochs: the total, so that a resumed run does what is left of it; None: only `max_iterations` counts.
            max_iterations: the total over all epochs, within `max_epochs` (1, where it is not given). An epoch that it
                cuts short is not completed: no `EPOCH_COMPLETED`, no metrics.
            epoch_length: iterations of an epoch; by default what `len(data)` says, else until the data ends.
                Longer than the data: it is iterated again; shorter: each epoch takes the first ones.
            allow_changed_data: go on although the data have another length than the run was begun with, or a loader of
                `prepare_data_loader` another global batch or seed; without it, that is a ValueError.

        Returns:
            `engine.state`.

        Raises:
            TypeError, ValueError: an argument is wrong (nothing has been changed then), or there is not a single
                batch (with several ranks an empty shard is legal, as long as another rank has a batch in that epoch).
            LaunchError: a launcher started several processes, but no process group is open.
            ConsistencyError: what all ranks must have alike differs: metrics, models, prepared data, handlers that are
                collective.
            RuntimeError: this engine is running already, or a one-shot iterator ran dry.
            Any exception of a step, a handler or the data, after `EXCEPTION_RAISED`.
            RemoteRankError, StallError: another rank failed, vanished or hangs; it tells which one, and where it was.

        Cost: over several ranks, one all-reduce of 5 numbers at the start (what must be alike), one more of 1 number
        over data of which no rank knows the length, and one all-reduce an epoch if there are metrics.
        """
        feed = self._checked(data, max_epochs, max_iterations, epoch_length)
        self._check_data(feed, allow_changed_data)
        self._begin(feed, *(None if limit is None else operator.index(limit) for limit in (max_epochs, max_iterations)))
        started_s = time.perf_counter()
        try:
            self._run_epochs(feed, started_s)
            self._settle_metrics(is_read=True)
        except BaseException as error:
            self._leave_by(error)
            raise
        finally:
            self.state.times["run"] = time.perf_counter() - started_s
            self.state.batch = None
            self._settle_metrics(is_read=False)  # after a failure: a device may have failed, or wait for a lost rank
            self._current_run().end()
            self._run = None
            self._resuming.end_run()
        return self.state

    # -- leaving a run ---------------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """Leave the run after the current iteration, on every rank at the same one. Without a run it does nothing.

        Call it on any rank, or on several. Where others have begun a further iteration by then, all ranks do that one
        too: with steps that wait for each other (DDP) it is one or two, without, as many as fit into some milliseconds.
        In a run that ends anyway before that, it changes nothing.
        """
        if self._run is not None:
            self._run.request_stop("run", self.state.epoch)

    def preempt(self) -> None:
        """As `terminate()`, for a job that is to go on elsewhere: `state.preempted` is true, on every rank, from
        `TERMINATED` on, and `COMPLETED` does not fire. `Preemption` calls it.
        """
        if self._run is not None:
            self._run.request_stop("run", self.state.epoch, reason=_PREEMPTED)

    def terminate_epoch(self) -> None:
        """Leave the epoch after the current iteration, on every rank at the same one; it counts as completed.

        Called in `EPOCH_STARTED`, it skips the epoch's iterations; outside an epoch it does nothing. Otherwise as
        `terminate`.
        """
        if self._run is not None and self._run.started >= 0:  # not in STARTED
            self._run.request_stop("epoch", self.state.epoch)

    # -- the levels of the loop ------------------------------------------------------------------------------------

    def _run_epochs(self, feed: Feed, started_s: float) -> None:
        state = self.state
        if self.distributed:
            self._compare_start(feed)
        is_fresh = state.iteration == 0
        self._fire_event(Events.STARTED)
        max_epochs = NEVER if state.max_epochs is None else state.max_epochs
        while state.epochs_completed < max_epochs and self._run_epoch(feed):
            pass
        self._resuming.return_between_epochs(feed)  # where nothing was left to do
        state.times["run"] = time.perf_counter() - started_s
        if self._is_terminated:
            self._fire_event(Events.TERMINATED)
        if not state.preempted:
            self._fire_event(Events.COMPLETED)
        if not self._is_terminated and is_fresh and (world().rank == 0 or not self.distributed):
            self._warn_of_idle()

    def _run_epoch(self, feed: Feed) -> bool:
        """Run one epoch, or what is left of it. False where it was cut short, so that the run is over."""
        state = self.state
        started_s = time.perf_counter()
        # Taken in a handler of EPOCH_STARTED, a state goes on behind it, as with every other event.
        is_new = state.epoch < state.epochs_completed or state.iteration == 0
        if is_new and state.iteration >= self._max_iterations:
            return False
        if not self._may_begin(position(state.epochs_completed, 0 if is_new else state.epoch_iteration)):
            return False
        if is_new:
            state._epoch, state._epoch_iteration = state.epochs_completed, 0
            self._resuming.return_between_epochs(feed)
        self._metrics.reset()
        state.metrics = self._metrics.shown_live(state.metrics)
        if is_new:
            self._fire_event(Events.EPOCH_STARTED)
        elif (saved := self._resuming.saved()) is not None:
            self._give_back_metrics(saved)
        has_ended = self._run_iterations(feed)
        state.batch = None
        if state.epoch_iteration:
            self._current_run().note_batches(state.epoch)
        may_end = self._may_begin(position(state.epoch, END))
        if not has_ended or not may_end:
            return False
        if not state.epoch_iteration:  # its end is begun by now: a rank without a batch holds up nobody's stop
            self._check_batches(feed)
        state.metrics.update(self._values(is_whole=is_new))
        state._epochs_completed = state.epoch + 1
        self._resuming.end_epoch(feed)
        state.times["epoch"] = time.perf_counter() - started_s
        self._fire_event(Events.EPOCH_COMPLETED)
        return True

    def _run_iterations(self, feed: Feed) -> bool:
        """Iterate until the epoch ends (True) or is cut short, by `max_iterations` or `terminate()` (False)."""
        state, run = self.state, self._current_run()
        epoch_start = state.iteration - state.epoch_iteration
        feed.enter(state.epoch)
        state.data_state = feed.described(state.epoch)
        if feed.length is not None:
            state._epoch_length = feed.length
        if feed.length == 0:
            feed.refuse_no_batch()
        end = NEVER if feed.length is None else epoch_start + feed.length
        run.started = position(state.epoch, state.epoch_iteration + 1)
        if not self._goes_on(end):
            return self._has_ended(end)
        self._announce_fetch()
        batches = self._first_batches(feed)
        pass_start = epoch_start
        while True:
            if not self._run_pass(batches):
                if not self._goes_on(end):
                    if state.iteration >= end:
                        feed.finish(state.iteration - pass_start)
                    return self._has_ended(end)
                self._announce_fetch()
            elif feed.is_over(state.epoch, state.iteration, is_empty=state.iteration == pass_start):
                self._fetch_started_offset -= 1  # the last fetch was announced, but there was nothing to get
                if not feed.is_length_given:
                    state._epoch_length = state.epoch_iteration
                return True
            else:
                pass_start = state.iteration
                batches = feed.start()

    def _first_batches(self, feed: Feed) -> Iterator[Any]:
        """The batches of the epoch from where it stands, the random number generators set as they were then."""
        consumed, self._consumed_before = self._consumed_before, 0
        batches = self._resuming.first_batches(feed, skip=self.state.epoch_iteration, consumed=consumed)
        if self.state.epoch_iteration:  # there was a batch; there may be no more
            return batches
        return feed.looked_into(batches, self.state.epoch, self.state.iteration)

    def _settle_metrics(self, *, is_read: bool) -> None:
        """The values of an epoch that was cut short are what they are now; none goes on with the next run."""
        if isinstance(self.state.metrics, MetricValues):
            self.state.metrics.settle(is_read=is_read)

    def _give_back_metrics(self, resumed: RandomState) -> None:
        if not self.distributed:
            return
        is_whole = resumed["world_size"] == world().size and self._metrics.give_back(resumed["metrics"])
        if not is_whole and world().rank == 0:
            warnings.warn(
                f"The metrics of epoch {self.state.epoch} are of what is left of it: the run was begun with other "
                "metrics or another number of ranks.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _run_pass(self, batches: Iterator[Any]) -> bool:
        """The loop itself: what stands here is paid in every iteration. True where the data ran dry."""
        state, step, run = self.state, self._step, self._current_run()
        get_batch_started, get_batch_completed, started, completed = self._loop_channels
        iteration = state.iteration
        epoch_offset = iteration - state.epoch_iteration
        next_place = position(state.epoch, 1) - epoch_offset
        fetch_started_offset, fetch_completed_offset = self._fetch_started_offset, self._fetch_completed_offset
        for batch in batches:
            state.batch = batch
            iteration += 1
            if iteration - fetch_completed_offset >= get_batch_completed.due:
                get_batch_completed.fire(self, iteration - fetch_completed_offset)
            state._iteration = iteration
            state._epoch_iteration = iteration - epoch_offset
            if iteration >= started.due:
                started.fire(self, iteration)
            state.output = step(self, state.batch)
            self._iterations_done = iteration
            if self._metrics.updates and type(state.batch) is not Absent:
                self._metrics.update(state.output)
            if iteration >= completed.due:
                completed.fire(self, iteration)
            run.started = next_place + iteration  # told before it is asked for: see control/stop.py
            if iteration >= self._stop_at:
                return False
            if iteration + 1 - fetch_started_offset >= get_batch_started.due:
                get_batch_started.fire(self, iteration + 1 - fetch_started_offset)
        return True

    def _compare_start(self, feed: Feed) -> None:
        """Have the ranks compare what they must have alike, before anything of the run happens. Collective.

        Raises:
            MetricStateError, ConsistencyError: on every rank, naming the rank and the first thing that differs.
            ValueError: no rank has a batch; on every rank.
        """
        if world().size == 1:
            self._metrics.agree()
            return
        compared = must_be_alike(
            feed.data,
            self._current_run(),
            self._dispatcher,
            stop_every=self._stop_every,
            epochs_completed=self.state.epochs_completed,
        )
        start = self._metrics.agree(compared, batches=feed.expected(), data=samples_if_whole(feed.data))
        feed.take(start.most_batches)
        if start.is_same_data:
            warn_of_whole_data(feed.data)

    def _check_batches(self, feed: Feed) -> None:
        """This rank had no batch in the epoch, which is legal as long as another one had.

        Raises: ValueError: none had, which all of them raise.
        """
        run, state = self._current_run(), self.state
        if not run.must_check and not run.has_any_rank_batches(state.epoch):
            feed.refuse_empty_epoch(state.epoch, state.iteration)

    # -- how far the loop may go ---------------------------------------------------------------------------------

    def _may_begin(self, next_place: int) -> bool:
        """Tell that `next_place` is begun, an epoch or its end, unless all ranks leave the run before it."""
        run = self._current_run()
        run.started = next_place
        if run.must_check and next_place > run.stop_targets(self.state.epoch)[0]:
            self._is_terminated = True
            self.state._preempted = run.reason == _PREEMPTED
        return not self._is_terminated

    def _goes_on(self, end: int) -> bool:
        """Whether there is another iteration in this epoch, which ends at `end` unless it is to be left before."""
        state, run = self.state, self._current_run()
        stop_at = self._stop_at = min(end, self._max_iterations)
        if run.must_check:
            epoch_start = state.iteration - state.epoch_iteration
            for target in run.stop_targets(state.epoch):
                if target is not None:
                    num_iterations = max(target - position(state.epoch, 0), 0)
                    num_iterations += -num_iterations % self._stop_every
                    stop_at = min(stop_at, epoch_start + num_iterations)
            # The thread may set it to 0 again right after: then the loop only comes here once more.
            self._stop_at = stop_at
        return state.iteration < stop_at

    def _has_ended(self, end: int) -> bool:
        """Whether the epoch that was left has come to its end, or was ended by `terminate_epoch()`."""
        run = self._current_run()
        is_left = run.must_check and run.stop_targets(self.state.epoch)[1] is not None
        return self.state.iteration >= end or is_left

    def _values(self, *, is_whole: bool) -> dict[str, MetricValue]:
        """The metrics of the epoch. None where it was skipped, or resumed (not `is_whole`) at its very end."""
        run = self._current_run()
        if run.must_check and run.stop_targets(self.state.epoch)[1] == position(self.state.epoch, 0):
            return {}  # left without an iteration on any rank
        try:
            return self._metrics.compute(distributed=self.distributed)
        except NotComputableError:
            if is_whole:
                raise
            return {}

    def _announce_fetch(self) -> None:
        channel, count = self._loop_channels[0], self.state.iteration + 1 - self._fetch_started_offset
        if count >= channel.due:
            channel.fire(self, count)

    def _current_run(self) -> Run:
        assert self._run is not None
        return self._run

    def _interrupt(self) -> None:
        self._stop_at = 0

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as plain numbers, strings, lists and dicts.

        An iteration that is still under way (in its step, or in `ITERATION_STARTED`) counts as not begun, so that a
        resumed run does it again.
        """
        state_dict = self.state.state_dict()
        under_way = self.state.iteration - self._iterations_done
        state_dict["iteration"] -= under_way
        state_dict["epoch_iteration"] -= under_way
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Have the next `run()` go on from where `state_dict` was taken.

        Raises:
            ValueError: a wrong, missing or unknown entry, named; the engine is unchanged.
            RuntimeError: the engine is running.
        """
        self._refuse_while_running("load_state_dict()")
        self.state.load_state_dict(state_dict)
        self._iterations_done = self.state.iteration
        self._is_resumed = True

    def random_state(self) -> RandomState:
        """What a resumed run needs of this rank: its random number generators, as they are now and as they were when
        the epoch's iterator began, and what the metrics have gathered of the epoch.

        Of tensors, numbers, strings, lists and dicts. A `Checkpoint` saves it of every rank.
        """
        under_way = self.state.iteration - self._iterations_done
        return {
            **self._resuming.state(is_epoch_begun=self.state.epoch_iteration > under_way),
            "data_state": deepcopy(self.state.data_state),
            "metrics": self._metrics.held() if self.distributed else [],
            "world_size": world().size,
        }

    def load_random_state(self, random_state: RandomState, *, data_only: bool = False) -> None:
        """Have the next `run()` go on, on this rank, with the generators and metrics that `random_state()` gave.

        Args:
            data_only: it is of another rank, so that only how often the data were passed over counts.

        Raises:
            RuntimeError: the engine is running.
        """
        self._refuse_while_running("load_random_state()")
        self._resuming.load(passes_of(random_state) if data_only else random_state)

    def data_restored(self, objects: Iterable[Any]) -> None:
        """Have the next `run()` take its data as they are where they iterate over one of `objects`, which were restored
        to their position by a state of their own. `Checkpoint.resume` calls it with all that it has loaded.

        Raises:
            RuntimeError: the engine is running.
        """
        self._refuse_while_running("data_restored()")
        self._resuming.data_restored(objects)

    # -- parts of a run --------------------------------------------------------------------------------------------

    def _checked(self, data: Any, max_epochs: Any, max_iterations: Any, epoch_length: Any) -> Feed:
        """The arguments of `run`, checked before anything is changed."""
        self._refuse_while_running("run()")
        check_data(data)
        if self.distributed:
            refuse_forgotten_group("run() of an Engine")
        if max_epochs is None and max_iterations is None:
            raise ValueError("max_epochs=None runs without an end: pass max_iterations= as well.")
        for name, value in (("max_epochs", max_epochs), ("max_iterations", max_iterations)):
            if value is not None:
                whole_number(name, value, least=1)
        if epoch_length is not None:
            epoch_length = whole_number("epoch_length", epoch_length, least=1)
        may_be_empty = self.distributed and world().size > 1
        feed = Feed(data, epoch_length, is_joined=self._is_joined, may_be_empty=may_be_empty)
        if feed.length == 0:
            feed.refuse_no_batch()
        return feed

    def _check_data(self, feed: Feed, allow_changed_data: bool) -> None:
        """Refuse to go on with other data than the run was begun with."""
        state = self.state
        if self._is_resumed and not allow_changed_data:
            feed.check_same(self._resuming.saved_data(state.data_state), default_epoch=state.epochs_completed)
        state.data_state = feed.described(state.epochs_completed)

    def _begin(self, feed: Feed, max_epochs: int | None, max_iterations: int | None) -> None:
        state = self.state
        self._run = begin_run(is_shared=self.distributed, where=partial(levels, Engine._run_epochs.__code__))
        if not self._is_resumed:
            state._epoch = state._iteration = state._epoch_iteration = state._epochs_completed = 0
            self._iterations_done = 0
        state._max_epochs = max_epochs
        if feed.length is not None or not self._is_resumed:
            state._epoch_length = feed.length
        state._dataloader = feed.data
        # New dicts: who kept those of an earlier run keeps its values.
        state.metrics, state.times = MetricValues(), {}
        state.output = state.batch = state.exception = None
        self._max_iterations = NEVER if max_iterations is None else max_iterations
        self._is_terminated = state._preempted = False
        self._fetch_started_offset = self._fetch_completed_offset = state.iteration
        self._consumed_before = state.iteration
        self._is_resumed = False
        self._resuming.begin_run(feed)
        self._dispatcher.rewind()
        self._run.interrupt = self._interrupt

    def _leave_by(self, error: BaseException) -> None:
        """Tell the other ranks of `error`, before anything else, since they wait; then fire `EXCEPTION_RAISED`.

        Raises: the failure of another rank, where `error` is only what it looks like from here.
        """
        raised = self._current_run().failed(error)
        self.state.exception = raised
        self._dispatcher.channel(Events.EXCEPTION_RAISED).fire_despite(self, raised)
        if raised is not error:
            raise raised from None

    def _fire_event(self, event: Events) -> None:
        self._fire(self._dispatcher.channel(event))

    def _fire(self, channel: Channel) -> None:
        if not channel.subscriptions:
            channel.count += 1
        elif channel.event in _PER_ITERATION or channel.event in _PER_EPOCH:
            # Fired by hand, a count may come twice: neither call takes another one's place.
            channel.rewind()
            channel.fire(self, self.state.iteration if channel.event in _PER_ITERATION else self.state.epoch + 1)
            channel.rewind()
        else:
            channel.count += 1
            channel.fire(self, channel.count)

    def _warn_of_idle(self) -> None:
        """Say which handlers a whole run, from its beginning, could not call: no run like it ever will."""
        idle = []
        for channel in self._dispatcher.channels:
            count = channel.count
            if channel.event in _PER_EPOCH:
                count = self.state.epochs_completed
            elif channel in self._loop_channels:
                count = self.state.iteration
            idle += [(subscription, count) for subscription in channel.idle(count)]
        if idle:
            warn_of_idle(idle)

    def _refuse_while_running(self, call: str) -> None:
        if self._run is not None:
            raise RuntimeError(f"{call} was called while this engine is running: use a second Engine inside a handler.")


def engines_around(engine: Engine) -> list[Engine]:
    """The engines, the nearest first, in whose handlers or steps the present run of `engine` takes place."""
    inner_first = running(Engine._run_epochs.__code__, frames_here())
    here = [index for index, each in enumerate(inner_first) if each is engine]
    return inner_first[here[-1] + 1 :] if here else []
