"""One step of the optimizer from the gradients of several batches, by weighted means or by DeepSpeed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dengine.dtensor import any_dtensor, local_part
from dengine.handlers.guard import Guard
from dengine.parallel.clipping import clip_grad_norm_
from dengine.parallel.gradients import Count, GradientMean, check_loss
from dengine.supervised.accelerator import distributed_kind
from dengine.supervised.deepspeed import DeepSpeedStep
from dengine.torch_internals import unscale

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["OptimizerStep", "make_optimizer_step"]


class OptimizerStep(Protocol):
    """One step of the optimizer: `start`; for each batch `begin`, the forward pass and `backward`; then `step`.

    Attributes:
        takes_counts: whether the count of a batch matters; else it need not be computed.
        is_alone: whether no gradient is sent to another rank.
        scaler: the loss scaler of fp16, or None.
        guard: judges each step before the optimizer makes it, or None.
    """

    takes_counts: bool
    is_alone: bool
    scaler: Any
    guard: Guard | None

    def start(self, num_batches: int | None) -> None: ...  # of this step; None: unknown
    def no_sync(self) -> AbstractContextManager[None]: ...
    def begin(self, count: Count, *, is_last: bool, is_alike: bool = False, is_absent: bool = False) -> None: ...
    def backward(self, loss: Tensor) -> None: ...
    def has_batch(self) -> bool: ...  # on any rank; else there is nothing to step with
    def step(self) -> bool: ...  # False: a guard has left it out
    def cut_short(self, num_batches: int) -> None: ...  # fewer came than `start` said
    def forget(self) -> None: ...
    def remember(self) -> Callable[[], None]: ...  # a function that goes back to the batches so far


def make_optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: "Accelerator",
    num_batches: int,
    max_grad_norm: float | None,
) -> OptimizerStep:
    if distributed_kind(accelerator) == "DEEPSPEED":
        return DeepSpeedStep(model, accelerator)
    return _WeightedStep(model, optimizer, accelerator, num_batches, max_grad_norm)


class _WeightedStep:
    """Steps with the gradient of the mean over the global batch, clipped, and by the rules of the loss scaler."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: "Accelerator",
        num_batches: int,
        max_grad_norm: float | None,
    ) -> None:
        # accelerate's wrapper steps only if its own count of batches allows it.
        self._optimizer: Any = getattr(optimizer, "optimizer", optimizer)
        self._model = model
        self._accelerator = accelerator
        self._max_grad_norm = max_grad_norm
        self._is_accelerates_fsdp = distributed_kind(accelerator) == "FSDP"
        self._mean = GradientMean(model, num_batches)
        self.scaler = accelerator.scaler
        self.guard: Guard | None = None
        self._is_spread = any_dtensor(self._parameters())
        self.is_alone = self._mean.is_alone
        # On one rank, one batch a step is its own mean: there is nothing to weigh or divide.
        self.takes_counts = not self.is_alone or num_batches > 1
        self._is_one_batch = num_batches == 1
        self._is_weighted = self.takes_counts
        self.no_sync = self._mean.no_sync
        self.forget = self._mean.forget
        self.remember = self._mean.remember

    def start(self, num_batches: int | None) -> None:
        self._optimizer.zero_grad()

    def begin(self, count: Count, *, is_last: bool, is_alike: bool = False, is_absent: bool = False) -> None:
        # One batch of each rank, all with the same count: DDP's own mean is right.
        self._is_weighted = self.takes_counts and not (is_alike and self._is_one_batch)
        if self._is_weighted:
            device = self._accelerator.device
            self._mean.begin(count, device, is_last=is_last, is_alike=is_alike, is_absent=is_absent)

    def backward(self, loss: Tensor) -> None:
        if self._is_weighted:
            self._mean.backward(loss, scaler=self.scaler)
        else:
            check_loss(loss)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def has_batch(self) -> bool:
        return not self._is_weighted or self._mean.has_batch()

    def step(self) -> bool:
        if self._is_weighted:
            self._mean.finish(self._parameters())
        if self.guard is not None and not self.guard.admits():
            return False
        if self.scaler is not None and not self._is_accelerates_fsdp:
            self._unscale(self.scaler)
        if self._max_grad_norm is not None:
            self._clip(self._max_grad_norm)
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        return True

    def cut_short(self, num_batches: int) -> None:
        """Accept a step with fewer batches: gradients are divided by the total that has come."""

    def _clip(self, max_norm: float) -> None:
        if self._is_accelerates_fsdp:
            self._accelerator.clip_grad_norm_(self._model.parameters(), max_norm)
            return
        clip_grad_norm_(self._parameters(), max_norm)

    def _unscale(self, scaler: Any) -> None:
        """Divide the gradients by the scale of the loss. If one is infinite, all ranks leave the step out."""
        if not self._is_spread:
            if self._max_grad_norm is not None:  # else the optimizer may do it in its own pass
                scaler.unscale_(self._optimizer)
            return
        gradients = [local_part(each.grad) for each in self._parameters() if each.grad is not None]
        found = unscale(scaler, self._optimizer, gradients)
        # Any rank may have the part of a gradient that did not fit.
        largest = torch.stack([each.to(self._accelerator.device) for each in found]).amax()
        if not self.is_alone:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        for each in found:
            each.copy_(largest)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
