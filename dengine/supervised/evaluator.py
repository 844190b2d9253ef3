"""Make an evaluator from a model and metrics."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dengine.distributed import evaluating, unwrap_model, world
from dengine.dtensor import any_dtensor
from dengine.engine import Absent, Engine, Events
from dengine.handlers.priorities import Priority
from dengine.launch.world import needs_all_ranks
from dengine.metrics.collection.metric_set import AnyMetric
from dengine.parallel.gradients import find_fsdp
from dengine.supervised.accelerator import accelerator_for, distributed_kind
from dengine.supervised.batches import (
    ModelFunction,
    OutputFunction,
    PrepareBatch,
    check_calls,
    checked_pair,
    pair_on_device,
)
from dengine.supervised.deepspeed import cast_around
from dengine.supervised.step import in_eval_mode
from dengine.supervised.wrapping import refuse_stage

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["create_supervised_evaluator"]


def create_supervised_evaluator(
    model: nn.Module,
    metrics: Mapping[str, AnyMetric] | None = None,
    *,
    accelerator: "Accelerator | None" = None,
    mixed_precision: str | None = None,
    output_transform: OutputFunction | None = None,
    prepare_batch: PrepareBatch | None = None,
    model_fn: ModelFunction | None = None,
    distributed: bool = True,
) -> Engine:
    """An engine that computes `metrics` of `model` over a loader: `evaluator.run(val_loader).metrics`.

    It is exact over shards: with `prepare_data_loader(val_loader, exact=True)` every sample counts once on any number
    of ranks. A run is in eval mode, without gradients, with rank 0's buffers on every rank (`evaluating`), and leaves
    the model as it was. For DDP the module inside is called, so that forward does not communicate. If forward is
    collective (FSDP, DeepSpeed), a rank whose shard ends first takes part with a batch that no metric counts.

    The step's output is `{"pred": ..., "label": ...}`, which metrics read as a (prediction, target) pair.

    Args:
        model: the model that is trained, wrapped or not.
        metrics: by name; more may be added by `add_metric`.
        accelerator, mixed_precision, prepare_batch, model_fn: as in `create_supervised_trainer`.
        output_transform: `(inputs, targets, pred) -> output`, instead of the output above.
        distributed: False makes it this rank's own (an evaluation on rank 0 only): over the rank's data, with its own
            buffers, and without a collective. Not for a model whose forward is collective (FSDP, DeepSpeed).

    Raises:
        TypeError, ValueError, ImportError, LaunchError: as in `create_supervised_trainer`. ValueError also for
            `distributed=False` with a model that only all ranks together can call.

    Cost: collective: one broadcast of the buffers a run, one all-reduce of all metrics; none if not `distributed`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"create_supervised_evaluator() takes a torch.nn.Module, but got {type(model).__qualname__}.")
    check_calls(
        {
            "output_transform": (output_transform, "inputs, targets, pred"),
            "prepare_batch": (prepare_batch, "batch, device"),
            "model_fn": (model_fn, "model, inputs"),
        }
    )
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics takes a dict such as {{'acc': Accuracy()}}, but got {metrics!r}.")
    refuse_stage(model, "create_supervised_evaluator")
    accelerator = accelerator_for(accelerator, mixed_precision)
    if world().size == 1 and not getattr(model, "_is_accelerate_prepared", False):
        model = model.to(accelerator.device)
    prepare = checked_pair(prepare_batch) if prepare_batch else pair_on_device
    step = _EvaluationStep(model, accelerator, prepare, model_fn, output_transform, distributed=distributed)
    evaluator = Engine(step, distributed=distributed, joined=step.is_collective)
    evaluator.add_metrics(metrics or {})
    evaluator.on(Events.STARTED, step.enter, priority=Priority.SETUP)
    # The first of these events; a preempted run fires no COMPLETED.
    evaluator.on(Events.TERMINATED | Events.COMPLETED | Events.EXCEPTION_RAISED, step.leave, priority=Priority.SETUP)
    return evaluator


class _EvaluationStep:
    """The step `(engine, batch)` of an evaluation, in eval mode, which a run enters and leaves."""

    def __init__(
        self,
        model: nn.Module,
        accelerator: "Accelerator",
        prepare_batch: PrepareBatch,
        model_fn: ModelFunction | None,
        output: OutputFunction | None,
        *,
        distributed: bool,
    ) -> None:
        kind = distributed_kind(accelerator)
        self.is_collective = find_fsdp(model) is not None or kind in ("FSDP", "DEEPSPEED")
        if not distributed and (self.is_collective or any_dtensor(model.parameters())):
            needs_all_ranks(
                "distributed=False, but this model is spread over the ranks, which only together can call it: leave "
                "distributed= out, and run the evaluator on every rank."
            )
        self._mode_of = evaluating if distributed else in_eval_mode
        self._wrapped = model
        self._called = model if self.is_collective else unwrap_model(model)
        self._device = accelerator.device
        self._autocast: Any = accelerator.autocast if accelerator.native_amp else None
        self._prepare_batch = prepare_batch
        self._model_fn = cast_around(model_fn) if kind == "DEEPSPEED" else model_fn
        self._output = output
        self._mode = ExitStack()

    def __call__(self, engine: Engine, batch: Any) -> Any:
        if type(batch) is Absent:
            batch = batch.spare
        inputs, targets = self._prepare_batch(batch, self._device)
        with torch.no_grad():
            if self._autocast is None:
                pred = self._predict(inputs)
            else:
                with self._autocast():
                    pred = self._predict(inputs)
        if self._output is not None:
            return self._output(inputs, targets, pred)
        return {"pred": pred, "label": targets}

    def _predict(self, inputs: Any) -> Any:
        return self._called(inputs) if self._model_fn is None else self._model_fn(self._called, inputs)

    def enter(self, engine: Engine) -> None:
        self._mode.enter_context(self._mode_of(self._wrapped))

    def leave(self, engine: Engine) -> None:
        self._mode.close()
