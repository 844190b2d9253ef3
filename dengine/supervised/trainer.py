"""Make a trainer from a model, an optimizer and a loss."""

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dengine.checks import number, whole_number
from dengine.engine import Engine
from dengine.handlers.guard import Guard
from dengine.naming import a_type
from dengine.supervised.accelerator import accelerator_for, distributed_kind
from dengine.supervised.batches import (
    LossFunction,
    ModelFunction,
    OutputFunction,
    PrepareBatch,
    WeightFunction,
    check_calls,
    checked_pair,
    checked_weight,
    default_weight,
    pair_on_device,
)
from dengine.supervised.deepspeed import cast_around, configured_num_batches, is_engine, is_placeholder
from dengine.supervised.optimizer_step import make_optimizer_step
from dengine.supervised.step import Functions, SupervisedEvents, train_step
from dengine.supervised.wrapping import refuse_stage, wrap

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["SupervisedEvents", "create_supervised_trainer"]


def create_supervised_trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFunction,
    *,
    accelerator: "Accelerator | None" = None,
    mixed_precision: str | None = None,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    output_transform: OutputFunction | None = None,
    prepare_batch: PrepareBatch | None = None,
    model_fn: ModelFunction | None = None,
    weight: WeightFunction | None = None,
    guard: bool | Mapping[str, Any] = False,
) -> Engine:
    """An engine that trains `model`: `create_supervised_trainer(model, optimizer, loss_fn).run(loader, max_epochs=9)`.

    The gradient of each step is that of the mean over the global batch: over all ranks and all batches of an
    accumulation, each weighted by its count, whatever their sizes. A rank whose shard ends before that of others
    (`prepare_data_loader(..., exact=True)`) takes part in the last steps with a weight of 0. An accumulation that is
    cut short by the end of the epoch or the run steps with the batches it has.

    The step's output is `{"loss": tensor, "pred": ..., "label": ...}`, of this rank's batch and without a graph.
    `SupervisedEvents.OPTIMIZER_STEP_COMPLETED` fires after each step of the optimizer.

    Args:
        model: a model that `prepare_model` or `accelerator.prepare` has wrapped, or one without a wrapper: that is
            moved to its device and, over several ranks, wrapped, by accelerate if `accelerate config` says FSDP or
            DeepSpeed.
        optimizer: over the parameters of `model`; accelerate's `DummyOptim` if DeepSpeed's configuration has one.
        loss_fn: `loss_fn(pred, targets)`, a mean over the samples (or tokens) that `weight` counts.
        accelerator: your own accelerator; by default one is made that agrees with `distributed.world()`.
        mixed_precision: "no", "fp16" (loss scaling, whose state is part of the engine's), "bf16", "fp8"; by default
        that of `accelerate launch` or the accelerator. Forward and loss run under autocast.
        gradient_accumulation_steps: the number of batches for one step, counted from the start of an epoch. Only the
            last of them sends gradients. `terminate()` and preemption leave after a whole accumulation.
        max_grad_norm: the norm to which gradients are clipped, over all parameters of the optimizer.
        output_transform: `(inputs, targets, pred, loss) -> output`, instead of the output above.
        prepare_batch: `(batch, device) -> (inputs, targets)`; by default the batch is that pair.
        model_fn: `(model, inputs) -> pred`; by default `model(inputs)`.
        weight: `(inputs, targets) -> number or 0-d tensor`, the count of a batch: for your own loss per token,
            `lambda inputs, targets: (targets != -100).sum()`. The default for `cross_entropy` and `nll_loss` (as a
            function, a module, or `functools.partial` of one) is the number by which they divide: the number of labels
            that are not their `ignore_index`, or the sum of their class weights. For one label a sample without class
            weights, and with torch's default `ignore_index` of -100, and for any other loss, it is the number of
            samples. It is only called if it matters: with several ranks, or an accumulation.
        guard: True leaves out steps with a loss or gradient that is not finite, on all ranks, as `handlers.Guard` says;
            its options are given as a dict: `guard={"spike": 8.0, "on_bad": "roll_back"}`.

    With DeepSpeed the batches of one accumulation have the same weight, as it adds them up at once: `weight` needs one
    batch a step then, and data without a length need `epoch_length`.

    Raises:
        TypeError, ValueError: an argument is wrong, or contradicts `accelerator`; the optimizer has no parameter of the
            model, or needs a closure (LBFGS); a function cannot be called as said above.
        ImportError: accelerate is not installed.
        LaunchError: accelerate finds other ranks than there are.

    Cost: collective over several ranks, if the model gets wrapped, or is in DDP that `prepare_model` did not make
        (whose buckets are built now, for a bit-identical resume). Compared to a plain loop: nothing on the device with
        one rank; with several the cost of `GradientMean`, and two small all-reduces an epoch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"create_supervised_trainer() takes a torch.nn.Module, but got {type(model).__qualname__}.")
    check_calls(
        {
            "loss_fn": (loss_fn, "pred, targets"),
            "output_transform": (output_transform, "inputs, targets, pred, loss"),
            "prepare_batch": (prepare_batch, "batch, device"),
            "model_fn": (model_fn, "model, inputs"),
            "weight": (weight, "inputs, targets"),
        }
    )
    num_batches = whole_number("gradient_accumulation_steps", gradient_accumulation_steps, least=1)
    if max_grad_norm is not None:
        max_grad_norm = number("max_grad_norm", max_grad_norm, "a number above 0, or None to clip nothing", above=0)
    accelerator = accelerator_for(accelerator, mixed_precision)
    is_deepspeed = distributed_kind(accelerator) == "DEEPSPEED"
    num_batches = _num_batches(num_batches, accelerator, is_deepspeed=is_deepspeed)
    _check_optimizer(optimizer, model, is_deepspeed=is_deepspeed)
    options = _guard_options(guard, is_deepspeed=is_deepspeed)
    refuse_stage(model, "create_supervised_trainer")
    if is_deepspeed and weight is not None and num_batches > 1:
        raise ValueError(
            f"With DeepSpeed, the {num_batches} batches of an accumulation count alike: leave weight= out, or take one "
            "batch a step."
        )
    model, optimizer = wrap(model, optimizer, accelerator, num_batches, max_grad_norm)
    functions = Functions(
        loss=loss_fn,
        prepare_batch=checked_pair(prepare_batch) if prepare_batch else pair_on_device,
        model=cast_around(model_fn) if is_deepspeed else model_fn,
        weight=checked_weight(weight) if weight else default_weight(loss_fn),
        output=output_transform,
    )
    optimizer_step = make_optimizer_step(model, optimizer, accelerator, num_batches, max_grad_norm)
    step = train_step(model, optimizer_step, accelerator, functions, num_batches)
    trainer = Engine(step, joined=True, stop_every=num_batches)
    step.attach(trainer)
    if options is not None:
        made = Guard(trainer, model, getattr(optimizer, "optimizer", optimizer), **options)
        made.serve(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, is_scaled=optimizer_step.scaler is not None)
        optimizer_step.guard = made
    return trainer


def _guard_options(guard: object, *, is_deepspeed: bool) -> dict[str, Any] | None:
    """The options of a Guard; None for none. Raises: TypeError, ValueError: there can be none."""
    if guard is False or guard is None:
        return None
    if guard is not True and not isinstance(guard, Mapping):
        raise TypeError(f"guard={guard!r} must be True, or a dict of options of Guard, such as {{'spike': 8.0}}.")
    options = {} if guard is True else dict(guard)
    known = [name for name, each in signature(Guard).parameters.items() if each.kind is each.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"guard= has no option {unknown[0]!r}: Guard takes {', '.join(known)}.")
    if is_deepspeed:
        raise ValueError(
            "DeepSpeed steps by itself, so that a Guard cannot leave a step out: train without it, with "
            'prepare_model(model, strategy="fsdp"), or leave guard= out.'
        )
    return options


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, *, is_deepspeed: bool) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer) and not (is_deepspeed and is_placeholder(optimizer)):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is {a_type(optimizer)}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates the loss by a closure of its own: write the step by hand, for an Engine.")
    if is_engine(model) or not isinstance(optimizer, torch.optim.Optimizer):
        return  # an optimizer of DeepSpeed
    stepped = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if not any(id(each) in stepped for each in model.parameters()):
        raise ValueError(
            f"None of the parameters of this {type(model).__qualname__} is in the optimizer, so that training would "
            "leave it as it is: build the optimizer from this model's parameters(), and after "
            'prepare_model(strategy="fsdp"), which puts sharded ones in their place.'
        )


def _num_batches(given: int, accelerator: "Accelerator", *, is_deepspeed: bool) -> int:
    """The number of batches of an accumulation, `given` here or to the accelerator."""
    theirs = configured_num_batches(accelerator) if is_deepspeed else int(accelerator.gradient_accumulation_steps)
    if given > 1 and theirs not in (1, given):
        raise ValueError(
            f"gradient_accumulation_steps={given}, but the Accelerator has {theirs}: give it in one place only."
        )
    return max(given, theirs)
