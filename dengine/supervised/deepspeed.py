"""Train with DeepSpeed through accelerate: its configuration, refused checkpoints, and a step of its engine."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dengine.checkpoint.states.external_state import mark_external
from dengine.parallel.gradients import Count, GradientMean, check_loss
from dengine.supervised.batches import ModelFunction
from dengine.types import is_short_float

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dengine.handlers.guard import Guard

__all__ = [
    "DeepSpeedStep",
    "cast_around",
    "check_clipping",
    "check_precision",
    "configured",
    "configured_num_batches",
    "is_engine",
    "is_placeholder",
    "keep_states_out",
]

_TO_BE_FILLED_IN = (None, "auto")


def configured_num_batches(accelerator: "Accelerator") -> int:
    """The number of batches of an accumulation, from DeepSpeed's configuration or accelerate's."""
    configured = _config(accelerator).get("gradient_accumulation_steps")
    return int(accelerator.gradient_accumulation_steps if configured in _TO_BE_FILLED_IN else configured)


@contextmanager
def configured(accelerator: "Accelerator", num_batches: int, max_grad_norm: float | None) -> Iterator[None]:
    """Fill the gaps in DeepSpeed's configuration inside the block, in which accelerate wraps a model.

    Raises: ValueError: the configuration clips gradients to another norm.
    """
    config = _config(accelerator)
    clipping = config.get("gradient_clipping")
    if clipping not in _TO_BE_FILLED_IN:
        check_clipping(max_grad_norm, clipping)
    before, num_before = deepcopy(config), accelerator.gradient_accumulation_steps
    try:
        if clipping in _TO_BE_FILLED_IN:
            # accelerate would clip to 1 by default.
            config["gradient_clipping"] = max_grad_norm or 0.0
        config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps = num_batches
        if config.get("train_micro_batch_size_per_gpu") in _TO_BE_FILLED_IN:
            # Only DeepSpeed's log uses it; batches may have any size.
            config |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": "auto"}
        yield
    finally:
        # Else the next trainer would take these values for those of the user.
        config.clear()
        config.update(before)
        accelerator.gradient_accumulation_steps = num_before


def check_clipping(max_grad_norm: float | None, configured: float) -> None:
    """Refuse a `max_grad_norm` other than the `configured` one. Raises: ValueError."""
    if max_grad_norm not in (None, configured):
        raise ValueError(
            f"max_grad_norm={max_grad_norm}, but DeepSpeed's configuration says gradient_clipping={configured}: give "
            "it in one place only."
        )


def check_precision(accelerator: "Accelerator") -> None:
    """Refuse fp16 without loss scaling: DeepSpeed would divide the gradients by the scale. Raises: ValueError."""
    stage = (_config(accelerator).get("zero_optimization") or {}).get("stage", 0)
    if accelerator.mixed_precision == "fp16" and stage == 0:
        raise ValueError(
            "DeepSpeed's stage 0 does not scale the loss in fp16, but divides the gradients by the scale all the same, "
            "so that the model hardly learns: say zero_stage: 1 in accelerate's configuration (stage 1 in "
            "DeepSpeed's), or train in bf16."
        )


def is_placeholder(optimizer: object) -> bool:
    """Whether it is accelerate's placeholder for the optimizer in DeepSpeed's configuration."""
    return type(optimizer).__name__ == "DummyOptim" and type(optimizer).__module__.startswith("accelerate.")


def is_engine(model: nn.Module) -> bool:
    return any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__)


def cast_around(call: ModelFunction | None) -> ModelFunction:
    """`call` with inputs cast to the precision of the model, if that has 16 bits, and predictions cast to 32 bits.

    DeepSpeed casts only the model, and the loss would be rounded.
    """

    from accelerate.utils import recursively_apply

    def called(model: nn.Module, inputs: object) -> Any:
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
        if dtype.itemsize > 2:
            return model(inputs) if call is None else call(model, inputs)
        inputs = recursively_apply(lambda tensor: tensor.to(dtype), inputs, test_type=_is_float)
        outputs = model(inputs) if call is None else call(model, inputs)
        return recursively_apply(Tensor.float, outputs, test_type=is_short_float)

    return called


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def keep_states_out(engine: Any, optimizer: object, accelerator: "Accelerator") -> None:
    """Make checkpoints refuse objects of which DeepSpeed has parts or copies: `optimizer` and the model in `engine`."""
    stage = engine.zero_optimization_stage()
    if stage == 0 and accelerator.mixed_precision == "no":
        return
    mark_external(engine.module, is_whole=stage < 3)
    for each in (engine.basic_optimizer, optimizer):  # another one if it is offloaded
        if isinstance(each, torch.optim.Optimizer):
            mark_external(each, is_whole=False)


def _config(accelerator: "Accelerator") -> dict[str, Any]:
    return accelerator.state.deepspeed_plugin.deepspeed_config  # type: ignore[no-any-return]


class DeepSpeedStep:
    """An `OptimizerStep` in which DeepSpeed sends, accumulates and clips the gradients.

    Batches are weighted over the ranks, but the batches of one accumulation have the same weight: DeepSpeed adds them
    up before their total is known.

    Cost: DeepSpeed's own collectives, in stages 2 and 3 in each backward pass; one all-reduce of one number a batch, if
    its count is not known.
    """

    scaler = None
    guard: "Guard | None" = None

    def __init__(self, model: nn.Module, accelerator: "Accelerator") -> None:
        self._engine: Any = model
        self._device = accelerator.device
        self._mean = GradientMean(model)
        self._num_in_step = 1
        self._num_done = 0  # batches whose gradients DeepSpeed holds
        self._first_count: Count | None = None  # of this step
        self._has_warned = False
        self.is_alone = self._mean.is_alone
        self.takes_counts = not self.is_alone

    def start(self, num_batches: int | None) -> None:
        """Start a step. Gradients are zero already, as DeepSpeed zeroes them after each step.

        Raises: ValueError: the number of batches is unknown.
        """
        if num_batches is None:
            raise ValueError(
                "With DeepSpeed, an accumulation must know from its first batch on how many there will be, but this "
                "data has no length: pass epoch_length= to run()."
            )
        self._num_in_step, self._first_count = num_batches, None

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, count: Count, *, is_last: bool, is_alike: bool = False, is_absent: bool = False) -> None:
        self._warn_of_other(count)
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        self._mean.begin(count, self._device, is_last=True, is_alike=is_alike)

    def backward(self, loss: Tensor) -> None:
        check_loss(loss)
        weight = self._mean.share() / self._num_in_step
        self._num_done += 1
        self._engine.backward(loss * weight, scale_wrt_gas=False)
        self._mean.forget()

    def has_batch(self) -> bool:
        return True  # it would keep the gradients, of zero, for the next step

    def step(self) -> bool:
        self._engine.step()
        self._num_done = 0
        return True

    def cut_short(self, num_batches: int) -> None:
        """Refuse a step with fewer batches than they were weighted for. Raises: RuntimeError."""
        raise RuntimeError(
            f"The data ended after {num_batches} of the {self._num_in_step} batches that an accumulation was to have "
            "by the length it gave, and DeepSpeed has weighted them by that: correct the data's __len__, or "
            "epoch_length=."
        )

    def forget(self) -> None:
        """Begin a run.

        Raises: RuntimeError: DeepSpeed still holds gradients of a run that failed.
        """
        if self._num_done:
            raise RuntimeError(
                "A run of this trainer failed within a step, and DeepSpeed keeps that step's gradients: make model, "
                "optimizer and trainer anew."
            )
        self._mean.forget()

    def remember(self) -> Callable[[], None]:
        return self._mean.remember()

    def _warn_of_other(self, count: Count) -> None:
        if self._num_in_step == 1 or isinstance(count, Tensor) or not count:
            return
        if self._first_count is None:
            self._first_count = count
        elif count != self._first_count and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"With DeepSpeed, the batches of an accumulation count alike, but this one has batches of "
                f"{self._first_count} and of {count}: its gradient is a mean of their means.",
                RuntimeWarning,
                stacklevel=2,
            )
