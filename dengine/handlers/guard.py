"""Leave out steps whose loss or gradient is not finite, or whose loss stands out, on all ranks together."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dengine.checks import number, whole_number
from dengine.comm.collectives import all_reduce
from dengine.distributed import world
from dengine.dtensor import local_part, summed_up
from dengine.engine import Absent, Engine, Events
from dengine.engine.events import AnyEvent
from dengine.errors import GuardError
from dengine.handlers.priorities import Priority
from dengine.handlers.spikes import Spikes
from dengine.handlers.step_followers import StepFollowers
from dengine.handlers.step_log import LoggedStep, StepLog, set_groups, settings_of
from dengine.handlers.step_states import StepStart, unsent_in
from dengine.handlers.step_verdict import Reading, Word, are_finite, is_bad_anywhere
from dengine.naming import a_type, other_names, shown
from dengine.parallel.gradients import check_loss, find_ddp
from dengine.random_state import Generators
from dengine.torch_internals import SENDS_BUFFERS_NEXT

__all__ = ["Guard"]

_WITHIN = 1000  # steps, in which there may be at most `max_bad` bad ones
_NUM_LATE = 4  # steps after which a device's verdict is read: by then it is there
_NUM_SHOWN = 5


class _Judged(NamedTuple):
    """A step whose verdict is still under way on the device."""

    first: int  # iteration
    last: int
    verdict: Reading
    losses: list[Tensor]  # of this rank
    outputs: list[Any]


@other_names(
    attach="Guard(trainer, model, optimizer) has attached itself, so no trainer.on(Events.ITERATION_COMPLETED, guard)",
)
class Guard:
    """Leaves out bad steps: on all ranks, if the loss or a gradient of any rank is not finite, or its loss a spike.

    After a bad step, parameters, optimizer state, buffers (running statistics) and random number generators are as
    before it: the run goes on bit by bit as on data without its batches. Metrics, `LRScheduler` and `EMA` leave it out
    too, and `SupervisedEvents.OPTIMIZER_STEP_COMPLETED` does not fire. `engine.state.skipped` lists the iterations
    (of an accumulation the last one), `engine.state.roll_backs` counts the returns; both are saved with the trainer,
    and `state.metrics` has `skipped` and `roll_backs` as numbers, for trackers and bars.

    For a supervised trainer write `create_supervised_trainer(..., guard=True)`, or `guard={"spike": 8.0}`. In a step by
    hand call `guard.backward(loss)` and `guard.step()` in place of `loss.backward()` and `optimizer.step()`, on every
    rank, with at most one step an iteration. Make it on every rank, after `prepare_model`, and before a resume.

    On the CPU a step is judged before the optimizer steps. On a device the verdict is read four steps later, so that
    neither the device nor the host waits for it: if it is bad then, all ranks return to the last snapshot before it,
    and do the steps since then again without it; the result is the same. Handlers of your own on
    `OPTIMIZER_STEP_COMPLETED` need to know at once: with one (other than `LRScheduler`, `EMA` and `Checkpoint`), and
    with fp16, each step waits. A save and the end of an epoch wait for what is under way.

    With fp16, gradients that do not fit are the scaler's matter, and only the loss is judged. `TerminateOnNan` on the
    same trainer does not look at a step that was left out, and on a device at none: the guard decides.

    Args:
        trainer: the engine whose step it guards; one guard for each engine.
        model: the model as it is called, wrapped or not.
        optimizer: over parameters of `model`.
        spike: a loss more than this many robust deviations (of the median, by the median of the deviations) above the
            last 128 good ones of its rank is bad, too, after 50 steps. 6 to 10 are usual values. None: no loss is.
        on_bad: "skip" leaves the step out. "roll_back" returns to the last snapshot too, and does the steps since then
            again: for a machine whose computations are not trusted.
        max_bad: more bad steps than that within 1000 iterations are an error.
        snapshot_every: iterations from one snapshot to the next; an epoch begins with one.
        num_snapshots: snapshots that are kept on a device, where each snapshot waits if it is the only one; on the CPU
            the last is enough.

    Raises:
        TypeError, ValueError: an argument is wrong; the optimizer has no parameter of the model; the trainer has a
            guard already. MemoryError: the snapshots do not fit into memory.
        GuardError: (in a step, on every rank) there were more than `max_bad` bad steps.

    Cost: a step reads each gradient once, and copies the buffers and the states of the generators (0.1 ms). With DDP
    the word that a loss is bad travels in the all-reduce of the gradients; otherwise one all-reduce of one number a
    step. With "roll_back", or on a device: a copy of weights and optimizer state to host memory every `snapshot_every`
    iterations, and the batches since the oldest snapshot are kept. To do steps again calls the process function, with
    whatever else it does; data that are changed in place by the step, or draw from the same generators between two
    steps, cannot be repeated exactly.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def train_step(engine, batch):
        ...     optimizer.zero_grad()
        ...     loss = model(batch).square().mean()
        ...     guard.backward(loss)
        ...     guard.step()
        ...     return loss.detach()
        >>> trainer = Engine(train_step)
        >>> guard = Guard(trainer, model, optimizer)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     trainer.run([torch.ones(2, 1), torch.full((2, 1), math.nan), torch.ones(2, 1)]).skipped
        [2]
    """

    is_collective = True
    precedes_saves = True

    def __init__(
        self,
        trainer: Engine,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        spike: float | None = None,
        on_bad: Literal["skip", "roll_back"] = "skip",
        max_bad: int = 10,
        snapshot_every: int = 100,
        num_snapshots: int = 2,
    ) -> None:
        _check(trainer, model, optimizer)
        if spike is not None:
            spike = number("spike", spike, "a number of robust deviations above 0, or None", above=0)
        if on_bad not in ("skip", "roll_back"):
            raise ValueError(f'on_bad={on_bad!r} must be "skip" or "roll_back".')
        self._max_bad = whole_number("max_bad", max_bad, least=0)
        every = whole_number("snapshot_every", snapshot_every, least=1)
        num_kept = whole_number("num_snapshots", num_snapshots, least=1)
        self._repeats = trainer.repeats
        self._engine, self._model, self._optimizer = trainer, model, optimizer
        self._parameters: list[nn.Parameter] = [each for group in optimizer.param_groups for each in group["params"]]
        self.is_late = _is_late(local_part(self._parameters[0]).device)
        self._rolls_back = on_bad == "roll_back"
        self._spikes = None if spike is None else Spikes(spike)
        self._spike = spike
        self._log: StepLog | None = None
        if self._rolls_back or self.is_late:
            self._num_snapshots = num_kept if self.is_late else 1
            self._log = StepLog(model, optimizer, every=every, num_snapshots=self._num_snapshots)
        self._word = Word(model, self._parameters)
        self._start = StepStart(model)
        self._is_shared = world().size > 1 and trainer.distributed
        self._followers = StepFollowers(trainer.repeats, are_ahead=self.is_late)
        self._is_scaled = False
        self._values: deque[tuple[int, float]] = deque(maxlen=_NUM_SHOWN)  # the last bad losses of this rank
        self._bad: bool | Tensor = False  # whether a loss of the step under way is bad
        self._losses: list[Tensor] = []  # of the step under way
        self._waiting: list[Any] = []  # outputs of the batches of an accumulation whose step is to come
        self._posted: tuple[Reading, list[Tensor]] | None = None  # the verdict of this iteration's step, and its losses
        self._judged: deque[_Judged] = deque()  # the oldest first
        self._is_started = self._reads_now = self._is_repeating = self._owes_return = self._must_know = False
        self._reset()
        if not hasattr(trainer.state, "skipped"):  # else it was loaded
            trainer.state.skipped, trainer.state.roll_backs = [], 0
        self._attach(trainer)

    def _attach(self, trainer: Engine) -> None:
        trainer.repeats.guard = self
        trainer.repeats.remember.append(self._remember)
        trainer.state.persist("skipped", "roll_backs")
        if self._spikes is not None:
            trainer.rank_states["spikes"] = self._spikes
        trainer.on(Events.STARTED, self._begin_run, priority=Priority.GUARD)
        trainer.on(Events.ITERATION_STARTED, self._begin, priority=Priority.GUARD)
        if self._log is not None:
            trainer.on(Events.ITERATION_STARTED, self._note, priority=Priority.CLEANUP)
        trainer.on(Events.ITERATION_COMPLETED, self, priority=Priority.GUARD)
        ends = Events.EPOCH_COMPLETED | Events.TERMINATED | Events.COMPLETED
        trainer.on(ends, self.flush, priority=Priority.GUARD)
        trainer.on(ends, self._pay, priority=Priority.SETUP - 1)  # after an accumulation that was cut short

    def __repr__(self) -> str:
        on_bad = "roll_back" if self._rolls_back else "skip"
        return shown(self, self._model, self._optimizer, spike=self._spike, on_bad=on_bad, max_bad=self._max_bad)

    # -- by hand ---------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Judge `loss`, and call its `backward()`. Raises: TypeError, ValueError: it is not one number."""
        check_loss(loss)
        self.watch(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> bool:
        """Step the optimizer, unless the step is bad. Gives whether it stepped (on a device, True until it is known).

        Collective, as the backward pass is. Raises: GuardError: there were too many bad steps.
        """
        is_good = self.admits()
        if is_good:
            self._optimizer.step()
        return is_good

    # -- parts of a step -------------------------------------------------------------------------------------------

    def serve(self, step_event: AnyEvent, *, is_scaled: bool) -> None:
        """Take notice of a step that fires `step_event` after each step, and may scale its loss."""
        self._followers.step_event, self._is_scaled = step_event, is_scaled
        if is_scaled:
            self.is_late = self._followers.are_ahead = False
            self._log = self._log if self._rolls_back else None

    def watch(self, loss: Tensor | None) -> None:
        """Judge the loss of a batch, before its backward pass; None for a placeholder, which does not count."""
        self._is_started = True
        if loss is None:
            return
        value = local_part(summed_up(loss.detach())).reshape(())
        is_spike = None if self._spikes is None else self._spikes.stands_out(value)
        if value.is_cpu and not self.is_late:
            is_bad = not math.isfinite(_number(value)) or (is_spike is not None and bool(is_spike.tolist()))
            self._bad = self._bad or is_bad
        else:
            bad = ~torch.isfinite(value)
            for each in (is_spike, None if self._bad is False else self._bad):
                bad = bad if each is None else bad | each
            self._bad = bad
        self._losses.append(value)
        self._word.announce(self._bad)
        self._repeats.hold_back()

    def admits(self) -> bool:
        """Whether the optimizer may step with the gradients that are there. Collective, unless gradients are averaged.

        Raises: GuardError: there were too many bad steps. RuntimeError: a second step within one iteration.
        """
        iteration = self._engine.state.iteration
        if self._repeats.is_rehearsal:
            return True
        if iteration == self._last_step and not self._is_repeating:
            raise RuntimeError(f"A Guard takes one step an iteration, but iteration {iteration} makes a second one.")
        bad = self._verdict()
        if self.is_late and not self._reads_now:
            assert isinstance(bad, Tensor)
            self._posted = Reading(bad), self._losses
            self._end_step(is_good=True)
            return True
        is_bad = Reading(bad).read() if isinstance(bad, Tensor) else bad
        losses = self._losses
        self._end_step(is_good=not is_bad)
        if not is_bad:
            self._count_waiting()
            self._repeats.release()
            return True
        self._start.restore()
        self._waiting = []
        if self._log is not None:
            self._log.drop(self._first, iteration)
        self._record(self._first, iteration, losses)
        return False

    def _verdict(self) -> bool | Tensor:
        bad: bool | Tensor = self._bad
        if not self._is_scaled:
            self._word.check_sent()
            finite = are_finite(each.grad for each in self._parameters if each.grad is not None)
            wrong = not finite if isinstance(finite, bool) else ~finite
            bad = wrong if bad is False else bad | wrong
        if self._is_scaled or not self._word.is_free:
            bad = is_bad_anywhere(bad) if self._is_shared else bad
        return torch.tensor(bad) if self.is_late and isinstance(bad, bool) else bad

    def _end_step(self, *, is_good: bool) -> None:
        self._last_step = self._engine.state.iteration
        if self._spikes is not None and is_good:
            self._spikes.keep()
        self._forget_step()

    def _forget_step(self) -> None:
        self._is_started, self._bad = False, False
        self._losses = []
        self._word.announce(False)
        if self._spikes is not None:
            self._spikes.drop()

    def _remember(self) -> Callable[[], None]:
        """A function that sets the step under way back to what it is now."""
        present = self._is_started, self._bad, self._losses.copy()
        keeps = None if self._spikes is None else self._spikes.remember()

        def set_back() -> None:
            self._is_started, self._bad, self._losses = present
            self._word.announce(self._bad)
            if keeps is not None:
                keeps()

        return set_back

    # -- handlers --------------------------------------------------------------------------------------------------

    def _begin_run(self, engine: Engine) -> None:
        self._reset()
        if engine.state.iteration == 0:
            engine.state.skipped, engine.state.roll_backs = [], 0
            if self._spikes is not None:
                self._spikes.reset()
        self._show()

    def _reset(self) -> None:
        self._forget_step()
        self._first = self._last_step = 0
        self._epoch = -1
        self._posted = None
        self._judged.clear()
        self._waiting = []
        self._last_seen = 0  # the iteration after whose step the guard has looked
        self._reads_now = self._is_repeating = self._owes_return = self._must_know = False
        if self._log is not None:
            self._log.clear()

    def _begin(self, engine: Engine) -> None:
        """Keep what the step of this iteration may change."""
        self._repeats.is_left_out = False
        if self._epoch != engine.state.epoch:
            self._begin_epoch(engine)
        self._reads_now = not self.is_late or self._must_know
        if self._is_started:
            return
        iteration = engine.state.iteration
        if self._log is not None:
            if self._num_snapshots == 1 and self._log.is_due(iteration - 1, iteration):
                while self._judged:
                    self._read_oldest()
            if self._log.is_due(iteration - 1, self._judged[0].first if self._judged else iteration):
                self._log.snapshot(iteration - 1, self._more())
        self._first = iteration
        if self._reads_now:
            self._start.take()

    def _begin_epoch(self, engine: Engine) -> None:
        """Collective on a device."""
        self._epoch = engine.state.epoch
        self._start.find_buffers()
        if self._log is not None:
            self._log.clear()
        if self.is_late:  # handlers may differ between ranks
            is_heard = self._followers.has_listeners()
            self._must_know = bool(all_reduce(int(is_heard), "max", name="listeners")) if self._is_shared else is_heard

    def _note(self, engine: Engine) -> None:
        if self._log is not None and engine.state.batch is not None:  # of None the step is not called
            self._log.note(engine.state.iteration, engine.state.batch)

    def __call__(self, engine: Engine) -> None:
        """Look at the step of this iteration, right after it; judge all that is under way, before a save."""
        if self._last_seen == engine.state.iteration:
            self.flush(engine)
            return
        self._take_output()
        while len(self._judged) > (0 if self._reads_now else _NUM_LATE):
            self._read_oldest(is_within_step=True)
        self._pay(engine, is_within_step=True)

    def flush(self, engine: Engine) -> None:
        """Judge all steps so far, and have the next one judged at once. Collective. Cost: waits for the device."""
        if self._last_seen != engine.state.iteration:
            self._take_output()
        while self._judged:
            self._read_oldest()
        self._count_waiting()
        self._reads_now = True
        if self._log is not None and not self._is_started:
            self._start.take()

    def _take_output(self) -> None:
        """Take the output of an iteration that the metrics have not seen; give the batch back to the handlers."""
        state = self._engine.state
        self._last_seen = state.iteration
        outputs = [state.output] if self._repeats.release() else []
        if self._log is not None and self._log.steps and self._log.steps[-1].iteration == state.iteration:
            self._log.steps[-1].end = Generators()
        if self._posted is not None:
            verdict, losses = self._posted
            self._judged.append(_Judged(self._first, state.iteration, verdict, losses, self._waiting + outputs))
            self._posted, self._waiting = None, []
        elif self._is_started:
            self._waiting += outputs

    def _count_waiting(self) -> None:
        outputs, self._waiting = self._waiting, []
        for output in outputs:
            self._repeats.count(output)

    def _read_oldest(self, *, is_within_step: bool = False) -> None:
        judged = self._judged.popleft()
        if not judged.verdict.read():
            for output in judged.outputs:
                self._repeats.count(output)
            return
        self._record(judged.first, judged.last, judged.losses)
        self._return(judged.first, judged.last, is_within_step=is_within_step)

    def _pay(self, engine: Engine, *, is_within_step: bool = False) -> None:
        """Return to the last snapshot, if the last step was bad and that is asked for."""
        if self._owes_return:
            self._owes_return = False
            self._return(self._bad_first, engine.state.iteration, is_within_step=is_within_step)

    # -- a bad step ------------------------------------------------------------------------------------------------

    def _record(self, first: int, iteration: int, losses: list[Tensor]) -> None:
        """Note a bad step. Raises: GuardError: there are too many."""
        state = self._engine.state
        state.skipped.append(iteration)
        self._repeats.is_left_out = iteration == state.iteration
        if self._rolls_back and not self._is_repeating:
            state.roll_backs += 1
            self._owes_return, self._bad_first = not self.is_late, first
        self._show()
        values = [_number(each) for each in losses]
        own = next((each for each in values if not math.isfinite(each)), max(values, default=math.nan))
        self._values.append((iteration, own))
        recent = [each for each in state.skipped if each > iteration - _WITHIN]
        if len(recent) > self._max_bad:
            known = ", ".join(f"{value} in iteration {each}" for each, value in self._values)
            raise GuardError(
                f"{len(recent)} of the last {_WITHIN} steps were bad, more than max_bad={self._max_bad}. The loss of "
                f"this rank was {known}. Where it is a usual number, its gradient or another rank's loss was not: look "
                "for batches that no step can take, for a learning rate that is too high, and for a broken device.",
                iterations=recent,
                losses=[value for _, value in self._values],
            )
        if not math.isfinite(own) or world().rank == 0:
            warnings.warn(
                f"The step of iteration {iteration} was left out on all ranks (the loss of this rank: {own}).",
                RuntimeWarning,
                stacklevel=2,
            )

    def _show(self) -> None:
        state = self._engine.state
        mine = {"skipped": len(state.skipped), "roll_backs": state.roll_backs}
        state.metrics.update({name: value for name, value in mine.items() if name not in self._engine.metric_names})

    # -- doing steps again -----------------------------------------------------------------------------------------

    def _return(self, first: int, last: int, *, is_within_step: bool) -> None:
        """Return to the last snapshot before iteration `first`, and do the steps since then again, but not those from
        `first` to `last`. `is_within_step`: the handlers of this iteration are still to come.
        """
        assert self._log is not None
        snapshot = self._log.last_before(first)
        present = settings_of(self._optimizer)
        again = _flowing(self._log.steps, snapshot.iteration)
        self._log.drop(first, last)
        self._take_back(snapshot.restore())
        self._forget_step()
        self._judged.clear()
        self._waiting = []
        self._repeats.forget_started()
        self._optimizer.zero_grad()
        for place in unsent_in(self._model):
            setattr(*place, None)
        if (ddp := find_ddp(self._model)) is not None:
            setattr(ddp, SENDS_BUFFERS_NEXT, True)  # as after each step
        current = self._engine.state.iteration
        self._repeats.is_left_out = False
        self._is_repeating = self._reads_now = True
        try:
            for step, flows in again:
                if not self._followers.has_schedule or step is again[0][0]:
                    set_groups(self._optimizer, step.settings)
                if not first <= step.iteration <= last:
                    self._do_again(step, flows=flows and step.iteration > last, counts=step.iteration > last)
                    comes_later = is_within_step and step.iteration == current
                    if not (comes_later or self._repeats.is_left_out):
                        has_stepped = self._last_step == step.iteration
                        self._followers.call(self._engine, step.iteration, has_stepped=has_stepped)
        finally:
            self._is_repeating = False
        if not self._followers.has_schedule:
            set_groups(self._optimizer, present)
        if current == last:
            self._repeats.is_left_out = True

    def _do_again(self, step: LoggedStep, *, flows: bool, counts: bool) -> None:
        """Run one iteration again. `flows`: its generators go on from those of the one before."""
        if not flows:
            step.start.restore()
        step.start, step.settings = Generators(), settings_of(self._optimizer)
        if not self._is_started:
            self._first = step.iteration
            self._start.take()
        self._repeats.is_left_out = False
        output = self._repeats.run(step.iteration, step.batch)
        self._repeats.release()
        step.end = Generators()
        if counts and type(step.batch) is not Absent and not self._repeats.is_left_out:
            if self._is_started:
                self._waiting.append(output)
            else:
                self._repeats.count(output)

    def _more(self) -> dict[str, Any]:
        more = self._followers.states()
        return more if self._spikes is None else {**more, "spikes": self._spikes.copied()}

    def _take_back(self, more: dict[str, Any]) -> None:
        if self._spikes is not None:
            self._spikes.load_state_dict(more["spikes"])
        self._followers.load(more)


def _flowing(steps: list[LoggedStep], after: int) -> list[tuple[LoggedStep, bool]]:
    """The steps after iteration `after`, and whether each went on with the generators as the one before left them."""
    found: list[tuple[LoggedStep, bool]] = []
    before: Generators | None = None
    for step in steps:
        if step.iteration > after:
            found.append((step, before is not None and before.are_as(step.start)))
        before = step.end
    return found


def _number(value: Tensor) -> float:
    """The number in `value`. Waits for its device; on the CPU it is only looked up."""
    found: Any = value.tolist()
    return float(found)


def _is_late(device: torch.device) -> bool:
    """Whether a verdict on this device is read some steps later, so that nobody waits for it."""
    return device.type == "cuda"


def _check(trainer: object, model: object, optimizer: object) -> None:
    if not isinstance(trainer, Engine):
        raise TypeError(f"Guard() takes an Engine, a model and an optimizer, but its trainer is {a_type(trainer)}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Guard() takes a torch.nn.Module as its model, but got {a_type(model)}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"Guard() takes a torch optimizer, but got {a_type(optimizer)}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates the loss several times a step, by a closure: a Guard cannot leave that out.")
    if trainer.repeats.guard is not None:
        raise ValueError(
            f"This engine has a guard already, {trainer.repeats.guard!r}: give one engine one Guard, also if "
            "create_supervised_trainer(guard=...) made it."
        )
    own = {id(each) for each in model.parameters()}
    stepped = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if not own & stepped:
        raise ValueError(
            f"None of the parameters of this {type(model).__qualname__} is in the optimizer, so that a Guard would "
            "judge another model's steps: give it the model and the optimizer of one training."
        )
