"""DeepSpeed through accelerate: what is to be said in its configuration, and a step of its engine."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dengine.checkpoint.elsewhere import keep_elsewhere
from dengine.distributed.gradients import Count, GradientMean, check_loss
from dengine.supervised.batches import ModelFunction

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["DeepSpeedUpdate", "cast_around", "check_clipping", "configure", "configured_num_batches", "is_placeholder"]

_TO_BE_FILLED_IN = (None, "auto")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def configured_num_batches(accelerator: "Accelerator") -> int:
    """Of an accumulation."""
    configured = _config(accelerator).get("gradient_accumulation_steps")
    return int(accelerator.gradient_accumulation_steps if configured in _TO_BE_FILLED_IN else configured)


def configure(accelerator: "Accelerator", num_batches: int, max_grad_norm: float | None) -> None:
    """Fill in what DeepSpeed's configuration leaves open, before a model is prepared.

    Raises: ValueError: gradients are to be clipped to another norm.
    """
    config = _config(accelerator)
    clipping = config.get("gradient_clipping")
    if clipping in _TO_BE_FILLED_IN:
        # accelerate would clip to 1 where nobody asked for it.
        config["gradient_clipping"] = max_grad_norm or 0.0
    else:
        check_clipping(max_grad_norm, clipping)
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps = num_batches
    if config.get("train_micro_batch_size_per_gpu") in _TO_BE_FILLED_IN:
        # For what DeepSpeed logs only; batches of any size are taken.
        config["train_micro_batch_size_per_gpu"] = 1


def check_clipping(max_grad_norm: float | None, configured: float) -> None:
    """Raises: ValueError: `max_grad_norm` is another one."""
    if max_grad_norm not in (None, configured):
        raise ValueError(
            f"max_grad_norm={max_grad_norm}, but DeepSpeed's configuration says gradient_clipping={configured}: give "
            "it in one place only."
        )


def is_placeholder(optimizer: Any) -> bool:
    """Whether it is accelerate's stand-in for the optimizer that DeepSpeed's configuration names."""
    return type(optimizer).__name__ == "DummyOptim" and type(optimizer).__module__.startswith("accelerate.")


def cast_around(call: ModelFunction | None, accelerator: "Accelerator") -> ModelFunction | None:
    """`call` with inputs in the precision of DeepSpeed's configuration, and predictions in 32 bits, as in a loss they
    would be rounded: DeepSpeed casts the model and nothing else."""
    dtype = _DTYPES.get(accelerator.mixed_precision)
    if dtype is None:
        return call

    def called(model: nn.Module, inputs: Any) -> Any:
        inputs = _floats_as(dtype, inputs)
        return _floats_as(torch.float32, model(inputs) if call is None else call(model, inputs))

    return called


def _floats_as(dtype: torch.dtype, value: Any) -> Any:
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda tensor: tensor.to(dtype), value, test_type=_is_float)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _config(accelerator: "Accelerator") -> dict[str, Any]:
    return accelerator.state.deepspeed_plugin.deepspeed_config  # type: ignore[no-any-return]


class DeepSpeedUpdate:
    """An `Update` whose gradients DeepSpeed sends, accumulates and clips.

    Batches are weighted over the ranks, those of one accumulation alike: DeepSpeed adds them up as they come, before it
    is known what they count together.
    """

    scaler = None

    def __init__(self, model: nn.Module, accelerator: "Accelerator") -> None:
        engine: Any = model
        stage = engine.zero_optimization_stage()
        if stage > 0 or accelerator.mixed_precision != "no":
            keep_elsewhere(engine.module, is_whole=stage < 3)
            keep_elsewhere(engine.basic_optimizer, is_whole=False)
        self._engine = engine
        self._device = accelerator.device
        self._mean = GradientMean(model)
        self._num_in_step = 1
        self.is_alone = self._mean.is_alone
        self.takes_counts = not self.is_alone
        self.forget = self._mean.forget

    def start(self, num_batches: int | None) -> None:
        """Gradients are zero already: DeepSpeed sees to that as it steps.

        Raises: ValueError: nobody knows the number of batches.
        """
        if num_batches is None:
            raise ValueError(
                "With DeepSpeed, an accumulation must know from its first batch on how many there will be, but this "
                "data tells no length: pass epoch_length= to run()."
            )
        self._num_in_step = num_batches

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, count: Count, *, is_last: bool, is_alike: bool = False) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        self._mean.begin(count, self._device, is_last=True, is_alike=is_alike)

    def backward(self, loss: Tensor) -> None:
        check_loss(loss)
        weight = self._mean.share() / self._num_in_step
        self._engine.backward(loss * weight, scale_wrt_gas=False)
        self._mean.forget()

    def step(self) -> None:
        self._engine.step()
