"""The gradient of the mean over all samples, or tokens, of all ranks since the last step of the optimizer.

Ranks with batches of different size, or different numbers of tokens, must not average their means. So each backward
pass is weighted by the share of its batch in the total of the step. If a step has one batch on each rank, the total is
known before the backward pass, and the average of DDP or FSDP is the right gradient, bit for bit if all batches have
the same count. If a step has several batches, gradients are added up, and divided by the total at the end.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dengine import torch_internals
from dengine.comm.collectives import all_reduce
from dengine.comm.waits import waiting
from dengine.dtensor import as_fsdp, local_part
from dengine.launch.world import world
from dengine.types import accumulator_dtype, summable

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

__all__ = ["Count", "GradientMean", "Scaler", "check_loss", "find_ddp", "find_fsdp", "scale_gradients"]

Count: TypeAlias = "int | float | Tensor"


class Scaler(Protocol):
    """The part of `torch.amp.GradScaler` that a backward pass needs."""

    def scale(self, outputs: Tensor) -> Tensor: ...


class GradientMean:
    """Weighted backward passes that add up to the gradient of one mean.

    For each batch of a step of the optimizer `begin(count)`, the forward pass and `backward(loss)`, all but the last
    batch inside `no_sync()`; then `finish(parameters)`. `loss` is the mean over `count` samples or tokens. Then `.grad`
    holds the gradient of `sum of count * loss / sum of count`, over all batches and ranks.

    A count of 0 leaves a batch out, as long as its loss is finite. Counts may be tensors. On a device they are not read
    on the host, except the first one if a `scaler` is used with several ranks and batches.

    Args:
        model: the model as it is called: in DDP, sharded by FSDP2, or, in a world of one, without a wrapper.
        num_batches: the intended number of batches of a step; counts are scaled by it in a world of one, so that equal
            counts give the bits of `(loss / num_batches).backward()`.

    Cost: over several ranks one all-reduce of one number a step, started before the last forward pass and needed after
    it (on a GPU the host does not wait for it); none if batches are known to have the same count. With several batches
    a step, one pass over the gradients. With several and a `scaler` over several ranks, one small all-reduce at the
    first batch.
    """

    def __init__(self, model: nn.Module, num_batches: int = 1) -> None:
        self._num_batches = num_batches
        ddp, fsdp = find_ddp(model), find_fsdp(model)
        self._group = None if ddp is None else ddp.process_group
        self._size = world().size if ddp is None else dist.get_world_size(ddp.process_group)
        self.is_alone = self._size == 1
        # torch learns the order of a static graph from its first backward pass, and fails if that sends nothing. To
        # send twice changes nothing: the mean of a mean is the same.
        self._sends_next = ddp is not None and ddp.static_graph
        self._no_sync: Any = nullcontext if ddp is None else ddp.no_sync
        if fsdp is not None:
            self._no_sync = partial(_fsdp_no_sync, fsdp)
        self._count: Count = 0.0  # of the batch under way
        self._total: Count = 0.0  # of this rank's batches since the last step
        self._num_absent = self._num_counted = 0  # of these, the ones that only take part, and all
        self._is_alike = self.is_alone  # whether the other ranks are known to have the same count
        # The totals of all ranks, of counts and of batches that do not only take part, and the work that sums them.
        self._sent: tuple[Tensor, Any] | None = None
        # The divisor of counts. On one rank: so that equal counts give the usual bits. On several, which must agree on
        # it: so that scaled losses do not overflow 16 bits.
        self._unit: Count | None = None
        self._seed: tuple[float, Tensor] | None = None  # of the last pass, as most batches have the same size

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward passes add to the gradients and send nothing, except the first of a static
        graph.
        """
        return nullcontext() if self.is_alone or self._sends_next else self._no_sync()

    def begin(
        self,
        count: Count,
        device: torch.device,
        *,
        is_last: bool,
        is_alike: bool = False,
        is_absent: bool = False,
    ) -> None:
        """Count a batch, before its forward pass on `device`.

        Args:
            is_absent: whether it is a placeholder, with which this rank only takes part.
            is_last: whether it is the last batch of this step, so that the gradients are sent.
            is_alike: whether the batches of this step are known to have the same counts on all ranks. The same value
                on all ranks.

        Raises: ValueError: a negative count.
        """
        if isinstance(count, Tensor):
            # A quotient of whole numbers would have 32 bits.
            on_host = count.device.type == "cpu"
            count = float(count) if on_host else count.detach().to(accumulator_dtype(count.device))
        else:
            count = summable(count)  # numpy adds its scalars in their own dtype
        if not isinstance(count, Tensor) and not count >= 0:
            raise ValueError(f"A batch cannot count {count!r}: its weight must be a number of at least 0.")
        self._count = count
        self._total = self._total + count
        self._num_counted, self._num_absent = self._num_counted + 1, self._num_absent + is_absent
        self._is_alike = is_alike or self.is_alone
        if is_last and not self._is_alike:
            total = torch.empty(2, dtype=accumulator_dtype(device), device=device)
            total[0], total[1] = self._total, self._num_counted - self._num_absent
            self._sent = total, dist.all_reduce(total, group=self._group, async_op=True)

    def has_batch(self) -> bool:
        """Whether any batch since the last step, of any rank, is more than a placeholder.

        Cost: waits for the device on a rank that had only placeholders, which is seldom.
        """
        if self._num_counted > self._num_absent:
            return True
        if self._sent is None:
            return False
        total, work = self._sent
        work.wait()
        return bool(total[1])

    def share(self) -> Count:
        """The weight of the loss if the step has one batch on each rank: the batch's share times the number of ranks.

        (Ranks average their gradients.)
        """
        return _ratio(self._size * self._count, self._total_of_all())

    def backward(self, loss: Tensor, *, scaler: Scaler | None = None) -> None:
        """Add the gradient of the batch's share of the mean.

        Raises: ValueError: the loss is not one number.
        """
        check_loss(loss)
        if self._num_batches == 1:
            weight = self.share()
        else:
            if self._unit is None:
                self._unit = self._first_unit(self._count, is_scaled=scaler is not None)
            weight = self._count / self._unit
        seed = self._seed_of(loss, weight)
        (loss if scaler is None else scaler.scale(loss)).backward(gradient=seed)  # type: ignore[no-untyped-call]
        self._sends_next = False

    def finish(self, parameters: list[nn.Parameter]) -> None:
        """Turn the gradients of `parameters` into those of the mean, and start the next step."""
        if self._num_batches > 1:
            assert self._unit is not None  # of the first backward pass
            factor = _ratio(self._size * self._unit, self._total_of_all())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients and not (isinstance(factor, float) and factor == 1.0):
                scale_gradients(gradients, factor)
        self.forget()

    def forget(self) -> None:
        """Drop the batches so far, and start again."""
        self._sent = None
        self._total = 0.0
        self._num_counted = self._num_absent = 0
        if self.is_alone:
            self._unit = None

    def remember(self) -> Callable[[], None]:
        """A function that goes back to the batches that were counted by now."""
        present = vars(self).copy()
        return lambda: vars(self).update(present)

    def _total_of_all(self) -> Count:
        """The total of all ranks: a number on the host, or a tensor that the device may still compute."""
        if self._is_alike:
            return self._size * self._total
        assert self._sent is not None
        total, work = self._sent
        with waiting:
            work.wait()
        return float(total[0]) if total.device.type == "cpu" else total[0]

    def _first_unit(self, count: Count, *, is_scaled: bool) -> Count:
        if not self.is_alone:
            # A power of two, so that nothing is rounded: a resumed run may find a different one.
            return (
                2.0 ** math.ceil(math.log2(max(all_reduce(float(count), "max", name="unit"), 1))) if is_scaled else 1.0
            )
        if isinstance(count, Tensor):
            return torch.where(count > 0, count, 1.0) * self._num_batches
        return (count or 1) * self._num_batches

    def _seed_of(self, loss: Tensor, weight: Count) -> Tensor:
        if isinstance(weight, Tensor):
            return weight.to(loss.device, loss.dtype, non_blocking=True).reshape(loss.shape)
        if self._seed is None or self._seed[0] != weight or not _are_alike(self._seed[1], loss):
            self._seed = (weight, torch.full_like(loss.detach(), weight))
        return self._seed[1]


def check_loss(loss: Tensor) -> None:
    """Check the loss. Raises: ValueError: it is not one number. TypeError: it is no tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must give a tensor, the mean over its batch, but gave {loss!r}.")
    if loss.numel() != 1:
        raise ValueError(f"The loss must be one number, the mean over its batch, but has shape {list(loss.shape)}.")


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper of `model`, which may be inside the wrapper of `torch.compile`; None without one."""
    inner = torch_internals.inside_compile(model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def find_fsdp(model: nn.Module) -> "FSDPModule | None":
    """The model that `fully_shard` has sharded, or None."""
    return as_fsdp(torch_internals.inside_compile(model))


@contextmanager
def _fsdp_no_sync(model: "FSDPModule") -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.device == other.device


def _ratio(above: Count, below: Count) -> Count:
    """The ratio `above / below`; 0 if nothing was counted, rather than infinite."""
    if isinstance(below, Tensor):
        return torch.where(below > 0, above / below, 0.0)
    if isinstance(above, Tensor):
        return above / below if below else 0.0
    return above / below if below else 0.0


def scale_gradients(gradients: list[Tensor], factor: Count) -> None:
    """Multiply `gradients`, which are on one device, in place; of DTensors, this rank's part."""
    if isinstance(factor, Tensor):
        factor = factor.to(gradients[0].device, non_blocking=True)
    with torch.no_grad():
        locals_ = [local_part(each) for each in gradients]
        if isinstance(factor, Tensor) and any(each.dtype != factor.dtype for each in locals_):
            for each in locals_:
                if each.dtype.itemsize >= 4:
                    each.mul_(factor.to(each.dtype))
                else:  # a tensor as the factor would be rounded to 16 bits before, on a GPU
                    each.copy_(each.float().mul_(factor.float()))
        else:
            torch._foreach_mul_(locals_, factor)
