"""One iteration of supervised training: forward, weighted backward and, at the end of an accumulation, a step."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dengine import trees
from dengine.distributed import unwrap_model, world
from dengine.engine import Absent, Engine, EventEnum, Events
from dengine.handlers.priorities import Priority
from dengine.parallel.gradients import Count
from dengine.supervised.batches import (
    ClassWeight,
    LossFunction,
    ModelFunction,
    PrepareBatch,
    WeightFunction,
    counts_samples,
    detached,
    num_samples,
    pair_on_device,
)
from dengine.supervised.deepspeed import is_engine
from dengine.supervised.optimizer_step import OptimizerStep
from dengine.supervised.uniform_batches import num_uniform

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Functions", "SupervisedEvents", "in_eval_mode", "train_step"]


class SupervisedEvents(EventEnum):
    """The events of a supervised trainer.

    `OPTIMIZER_STEP_COMPLETED` fires when an iteration that ends in a step is complete, before `ITERATION_COMPLETED`. A
    `Checkpoint` on it saves after the handlers of `ITERATION_COMPLETED`, so that it holds what they have done.
    """

    OPTIMIZER_STEP_COMPLETED = "optimizer_step_completed"


@dataclass(frozen=True)
class Functions:
    """The functions for batches, models and losses, from the user or by default."""

    loss: LossFunction
    prepare_batch: PrepareBatch
    model: ModelFunction | None
    weight: WeightFunction
    output: Callable[..., Any] | None


class TrainStep(ABC):
    """The step `(engine, batch)` of a training, and handlers that start and end an accumulation."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_step: OptimizerStep,
        accelerator: "Accelerator",
        functions: Functions,
        num_batches: int,
    ) -> None:
        self._model = model
        bare: Any = unwrap_model(model)
        self._bare: nn.Module = bare.module if is_engine(bare) else bare  # a wrapper has its own training mode
        self._step = optimizer_step
        self._autocast: Any = accelerator.autocast if accelerator.native_amp else None
        self._device = accelerator.device
        self._functions = functions
        self._num_batches = num_batches
        self._num_pending = 0  # batches whose gradients no step has used yet
        self._spare: Any = None  # the last one of these
        self._has_stepped = False
        # If only the data decide the number of samples of a batch, it can be known for many batches at once.
        weight = functions.weight
        is_set_by_data = (
            weight is num_samples or (isinstance(weight, ClassWeight) and weight.is_plain)
        ) and functions.prepare_batch is pair_on_device
        self._looks_ahead = is_set_by_data and optimizer_step.takes_counts and not optimizer_step.is_alone
        self._num_uniform = self._uniform_count = 0  # the epoch's first batches that have the same count on all ranks

    def attach(self, engine: Engine) -> None:
        engine.is_trainer = True
        engine.register_events(SupervisedEvents)
        engine.repeats.start_over.append(self._start_over)
        engine.repeats.remember.append(self._remember)
        engine.on(Events.STARTED, self._begin, priority=Priority.SETUP)
        engine.on(Events.EPOCH_STARTED, self._train_mode, priority=Priority.SETUP)
        # Not within the step: a resumed run would repeat the iteration that is under way.
        engine.on(Events.ITERATION_COMPLETED, self._fire_step_completed, priority=Priority.SETUP)
        # Before other handlers look at the model: an accumulation that was cut short steps with what it has.
        ends = Events.EPOCH_COMPLETED | Events.TERMINATED | Events.COMPLETED
        engine.on(ends, self._finish_accumulation, priority=Priority.SETUP)
        engine.on(Events.ITERATION_COMPLETED | ends, self._save, priority=Priority.CLEANUP)
        if self._step.scaler is not None:
            engine.state.grad_scaler = self._step.scaler.state_dict()
            engine.state.persist("grad_scaler")

    @abstractmethod
    def __call__(self, engine: Engine, batch: Any) -> Any: ...

    # -- parts of an iteration -------------------------------------------------------------------------------------

    def _pass(
        self, inputs: Any, targets: Any, count: Count, *, is_absent: bool, is_last: bool, is_alike: bool = False
    ) -> tuple[Any, Tensor]:
        """Run forward and backward. A placeholder batch leaves no trace in the model."""
        if is_absent and self._step.guard is not None:  # a weight of 0 leaves out only what is finite
            inputs, targets = trees.map_leaves(_made_finite, (inputs, targets))
        self._step.begin(count, is_last=is_last, is_alike=is_alike, is_absent=is_absent)
        if is_absent:
            with in_eval_mode(self._model):
                pred, loss = self._forward(inputs, targets)
        else:
            pred, loss = self._forward(inputs, targets)
        if self._step.guard is not None:
            self._step.guard.watch(None if is_absent else loss)
        self._step.backward(loss)
        return pred, loss

    def _forward(self, inputs: Any, targets: Any) -> tuple[Any, Tensor]:
        if self._autocast is None:
            return self._predict(inputs, targets)
        with self._autocast():
            return self._predict(inputs, targets)

    def _predict(self, inputs: Any, targets: Any) -> tuple[Any, Tensor]:
        call = self._functions.model
        pred = self._model(inputs) if call is None else call(self._model, inputs)
        return pred, self._functions.loss(pred, targets)

    def _finish_step(self, engine: Engine) -> None:
        if self._step.has_batch():
            self._has_stepped = self._step.step()
        else:  # all ranks left it out
            self._step.forget()
        self._num_pending, self._spare = 0, None
        if self._step.scaler is not None:
            engine.state.grad_scaler = self._step.scaler.state_dict()

    def _output(self, inputs: Any, targets: Any, pred: Any, loss: Tensor) -> Any:
        pred, loss = detached(pred), loss.detach()
        if self._functions.output is not None:
            return self._functions.output(inputs, targets, pred, loss)
        return {"loss": loss, "pred": pred, "label": targets}

    def _is_last(self, engine: Engine) -> bool:
        """Whether this iteration is the last one of an accumulation."""
        number = engine.state.epoch_iteration
        return number % self._num_batches == 0 or number == engine.state.epoch_length

    # -- handlers --------------------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        """Forget the accumulation that is under way."""
        self._num_pending, self._spare, self._has_stepped = 0, None, False
        self._step.forget()

    def _remember(self) -> Callable[[], None]:
        present, go_back = (self._num_pending, self._spare, self._has_stepped), self._step.remember()

        def set_back() -> None:
            self._num_pending, self._spare, self._has_stepped = present
            go_back()

        return set_back

    def _begin(self, engine: Engine) -> None:
        state = engine.state
        self._start_over()  # left by a run that failed
        engine.save_phase.waiting = []
        self._num_uniform = 0  # the rest of a resumed epoch may have other batches
        self._train_mode(engine)
        if state.iteration and self._step.scaler is not None:
            self._step.scaler.load_state_dict(state.grad_scaler)
        is_within = state.epochs_completed == state.epoch and state.epoch_iteration != state.epoch_length
        if (lost := state.epoch_iteration % self._num_batches) and is_within and world().rank == 0:
            warnings.warn(
                f"This run goes on from the middle of an accumulation: the gradients of {lost} of its "
                f"{self._num_batches} batches are not in a checkpoint, so its step is that of the others. Save at "
                f"SupervisedEvents.OPTIMIZER_STEP_COMPLETED, or every multiple of {self._num_batches} iterations.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _train_mode(self, engine: Engine) -> None:
        # Checked first: parts that the user keeps in eval mode stay in it.
        if not self._bare.training:
            self._model.train()

    def _fire_step_completed(self, engine: Engine) -> None:
        if self._num_pending and engine.state.batch is None and self._is_last(engine):
            self._finish_accumulation(engine)  # the step was not called for the last batch
        has_stepped, self._has_stepped = self._has_stepped, False
        if has_stepped and not engine.repeats.is_left_out:  # a guard may have found out since
            engine.save_phase.is_put_off = True  # savers wait until the other handlers of the iteration are done
            try:
                engine.fire_event(SupervisedEvents.OPTIMIZER_STEP_COMPLETED)
            finally:
                engine.save_phase.is_put_off = False

    def _save(self, engine: Engine) -> None:
        if engine.save_phase.waiting:
            engine.save_phase.run(engine)

    def _finish_accumulation(self, engine: Engine) -> None:
        """Step with the batches so far, if it was not known that the last one was the last."""
        if not self._num_pending:
            return
        self._step.cut_short(self._num_pending)
        if not self._step.is_alone:
            # A backward pass with weight 0 sends what was added up inside no_sync().
            inputs, targets = self._functions.prepare_batch(self._spare, self._device)
            self._pass(inputs, targets, 0, is_absent=True, is_last=True)
        self._finish_step(engine)
        self._fire_step_completed(engine)


class _LocalStep(TrainStep):
    """The step of a world of one without accumulation: a plain loop's step, and as fast."""

    def __call__(self, engine: Engine, batch: Any) -> Any:
        optimizer_step = self._step
        self._train_mode(engine)
        optimizer_step.start(1)
        inputs, targets = self._functions.prepare_batch(batch, self._device)
        optimizer_step.begin(1, is_last=True)
        pred, loss = self._forward(inputs, targets)
        if optimizer_step.guard is not None:
            optimizer_step.guard.watch(loss)
        optimizer_step.backward(loss)
        self._finish_step(engine)
        return self._output(inputs, targets, pred, loss)


class _WeighedStep(TrainStep):
    """The step from several weighted batches, of several ranks or of an accumulation."""

    def __call__(self, engine: Engine, batch: Any) -> Any:
        number = engine.state.epoch_iteration
        self._has_stepped = False
        is_last = self._is_last(engine)
        self._train_mode(engine)
        if self._num_pending == 0:
            self._step.start(self._num_in_step(engine))
        self._num_pending += 1
        is_absent = type(batch) is Absent
        if is_absent:
            batch = batch.spare
            self._refuse_sync_batch_norm()
        inputs, targets = self._functions.prepare_batch(batch, self._device)
        count: Count = 0 if is_absent else 1
        if not is_absent and self._step.takes_counts:
            count = self._functions.weight(inputs, targets)
        if number == 1 and self._looks_ahead:
            first_count = int(count) if counts_samples(self._functions.weight, targets) else 0
            done = engine.state.pass_iteration - 1  # 0, unless data are continued
            self._num_uniform = num_uniform(engine.state.dataloader, first_count, done=done)
            self._uniform_count = first_count
        is_alike = number <= self._num_uniform
        if is_alike and count != self._uniform_count:
            self._refuse_other_count(number, count)
        if is_last:
            pred, loss = self._pass(inputs, targets, count, is_absent=is_absent, is_last=True, is_alike=is_alike)
            self._finish_step(engine)
        else:
            with self._step.no_sync():
                pred, loss = self._pass(inputs, targets, count, is_absent=is_absent, is_last=False)
            self._spare = batch
        return self._output(inputs, targets, pred, loss)

    def _num_in_step(self, engine: Engine) -> int | None:
        """The number of batches of the step that begins with this one; None if unknown."""
        if self._num_batches == 1:
            return 1
        number, length = engine.state.epoch_iteration, engine.state.epoch_length
        to_boundary = self._num_batches - (number - 1) % self._num_batches
        return None if length is None else min(to_boundary, length - number + 1)

    def _refuse_other_count(self, number: int, count: Count) -> None:
        raise RuntimeError(
            f"Batch {number} of the epoch has {count} samples, but its data said at the beginning of the epoch that it "
            f"would have {self._uniform_count}, and the other ranks rely on that. Data that change meanwhile need "
            "weight=, for example weight=lambda inputs, targets: len(targets): then ranks exchange every count."
        )

    def _refuse_sync_batch_norm(self) -> None:
        if any(isinstance(module, nn.SyncBatchNorm) for module in self._model.modules()):
            raise ValueError(
                "SyncBatchNorm needs a batch on every rank, but this rank's data has ended before another one's, or "
                "its batch is None: give all ranks the same number of batches, as prepare_data_loader() does without "
                "exact=True, and leave none out."
            )


def _made_finite(leaf: Any) -> Any:
    is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.nan_to_num(0.0, 0.0, 0.0) if is_float else leaf


def train_step(
    model: nn.Module, optimizer_step: OptimizerStep, accelerator: "Accelerator", functions: Functions, num_batches: int
) -> TrainStep:
    is_alone = world().size == 1 and optimizer_step.is_alone and num_batches == 1
    return (_LocalStep if is_alone else _WeighedStep)(model, optimizer_step, accelerator, functions, num_batches)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode inside the block, and each module back into its own mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
