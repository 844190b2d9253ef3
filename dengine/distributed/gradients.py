"""The gradient of a mean over all that all ranks have seen since the last step of the optimizer.

Ranks with batches of different size, or of different numbers of tokens, must not average their means. So each backward
pass is weighted by what its batch counts, gradients are added up, and the sum is divided by the total count. With DDP
that total travels with the gradients, as one more number in the first bucket that is sent.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dengine.distributed.collectives import all_reduce
from dengine.distributed.world import world

__all__ = ["Count", "GradientMean", "Scaler", "find_ddp", "find_fsdp"]

Count: TypeAlias = "int | float | Tensor"


class Scaler(Protocol):
    """Of `torch.amp.GradScaler`, what a backward pass needs."""

    def scale(self, outputs: Tensor) -> Tensor: ...


class GradientMean:
    """Weighted backward passes that add up to the gradient of one mean.

    For each step of the optimizer: `backward(loss, count)` for each of its batches, all but the last inside
    `no_sync()`, then `finish(parameters)`. `loss` is the mean over `count` samples or tokens. Then `.grad` holds the
    gradient of `sum of count * loss / sum of count`, over all batches and ranks.

    A count of 0 leaves a batch out, as long as its loss is finite. Counts may be tensors; none is read on the host,
    but the first one where a `scaler` is used over several ranks.

    Args:
        model: as it is called: in DDP, sharded by FSDP2, or, in a world of one, bare.
        num_batches: how many batches are meant to make a step; counts are scaled by it in a world of one, so that
            equal ones give the bits of `(loss / num_batches).backward()`.

    Cost: no collective of its own with DDP, whose first bucket is copied (1 MiB at most). Where that bucket cannot
    carry the count (16-bit gradients, a communication hook of the user's own) and with FSDP, one all-reduce of one
    number a step, which the loop does not wait for before `finish`. One pass over the gradients. With a `scaler` over
    several ranks, one small all-reduce at the first batch.
    """

    def __init__(self, model: nn.Module, num_batches: int = 1) -> None:
        self._num_batches = num_batches
        ddp, fsdp = find_ddp(model), find_fsdp(model)
        size = world().size if ddp is None else dist.get_world_size(ddp.process_group)
        self.is_alone = size == 1
        self._carrier: _Bucket | _Beside = _Beside(size) if ddp is None else _carrier(ddp, size)
        # FSDP1, as accelerate makes it, has a no_sync() of its own, as DDP has.
        self._no_sync: Any = getattr(ddp or model, "no_sync", nullcontext)
        if fsdp is not None:
            self._no_sync = partial(_fsdp_no_sync, fsdp)
        self._total: Count = 0.0
        # What counts are divided by. Alone: so that equal ones give the usual bits. Over ranks, which must agree upon
        # it: so that scaled losses do not overflow 16 bits.
        self._unit: Count | None = None
        self._seed: tuple[float, Tensor] | None = None  # of the last pass: batches are mostly of one size

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside it, backward passes add to the gradients and send nothing."""
        return nullcontext() if self.is_alone else self._no_sync()

    def backward(self, loss: Tensor, count: Count, *, is_last: bool, scaler: Scaler | None = None) -> None:
        """Add the gradient of `count * loss`. `is_last`: of this step, so that the gradients are sent.

        Raises:
            ValueError: the loss is not one number; a negative count.
        """
        if loss.numel() != 1:
            raise ValueError(f"The loss must be one number, the mean over its batch, but has shape {list(loss.shape)}.")
        if not isinstance(count, Tensor) and not count >= 0:
            raise ValueError(f"A batch cannot count {count!r}: its weight must be a number of at least 0.")
        if isinstance(count, Tensor):  # a quotient of whole numbers would have 32 bits
            count = count.detach().to(accumulator_dtype(count.device))
        self._total = self._total + count
        if self._unit is None:
            self._unit = self._first_unit(count, is_scaled=scaler is not None)
        seed = self._seed_of(loss, count)
        if is_last and not self.is_alone:
            self._carrier.send(self._total, loss.device)
        (loss if scaler is None else scaler.scale(loss)).backward(gradient=seed)  # type: ignore[no-untyped-call]

    def finish(self, parameters: list[nn.Parameter]) -> None:
        """Divide the gradients of `parameters` by the total count of all ranks, and begin anew."""
        if self.is_alone:
            factor = _ratio(self._unit or 0.0, self._total)
        else:
            factor = _ratio(self._carrier.sum_over * (self._unit or 1.0), self._carrier.total())
        self.forget()
        if isinstance(factor, float) and factor == 1.0:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            _multiply(gradients, factor)

    def forget(self) -> None:
        """Begin anew without a step."""
        self._carrier.forget()
        self._total = 0.0
        if self.is_alone:
            self._unit = None

    def _first_unit(self, count: Count, *, is_scaled: bool) -> Count:
        if not self.is_alone:
            # A power of two, by which nothing is rounded: a resumed run may find another one.
            return (
                2.0 ** math.ceil(math.log2(max(all_reduce(float(count), "max", name="unit"), 1))) if is_scaled else 1.0
            )
        if isinstance(count, Tensor):
            return torch.where(count > 0, count, 1.0) * self._num_batches
        return (count or 1) * self._num_batches

    def _seed_of(self, loss: Tensor, count: Count) -> Tensor:
        weight: Any = count / self._unit  # type: ignore[operator]
        if isinstance(weight, Tensor):
            return weight.to(loss.device, loss.dtype, non_blocking=True).reshape(loss.shape)
        if self._seed is None or self._seed[0] != weight or self._seed[1].dtype != loss.dtype:
            self._seed = (weight, torch.full_like(loss.detach(), weight))
        return self._seed[1]


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Of sums: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper that `model` is, or has inside `torch.compile`'s."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def find_fsdp(model: nn.Module) -> Any:
    """The model that `fully_shard` has cut up, or None."""
    inner = getattr(model, "_orig_mod", model)
    # Importing the class costs 0.3 s.
    return inner if any(base.__name__ == "FSDPModule" for base in type(inner).__mro__) else None


class _Bucket:
    """The count as one more number in DDP's first bucket; DDP then adds gradients up instead of averaging them."""

    sum_over = 1.0  # gradients are the sum over so many ranks' average: nobody divides them

    def __init__(self, ddp: DistributedDataParallel, size: int) -> None:
        self._group = ddp.process_group
        self._size = size
        self._mine: Count | None = None  # None: a backward pass that is not ours, to be averaged as DDP does
        self._summed: list[Tensor] = []
        ddp.register_comm_hook(None, self._hook)

    def send(self, count: Count, device: torch.device) -> None:
        self._mine = count

    def total(self) -> Tensor:
        return self._summed[0]

    def forget(self) -> None:
        self._mine = None
        self._summed.clear()

    def _hook(
        self,
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        if self._mine is None:
            buffer.div_(self._size)
        elif bucket.index() == 0:
            return self._with_count(buffer, self._mine)
        sent: torch.futures.Future[Tensor] = _sent(buffer, self._group).then(_first)
        return sent

    def _with_count(self, buffer: Tensor, mine: Count) -> torch.futures.Future[Tensor]:
        sent = buffer.new_empty(buffer.numel() + 1)
        sent[:-1] = buffer
        sent[-1] = mine

        # Runs in a thread of the group's, and is let go there: were it the last to hold the group, by way of `self`,
        # that thread would wait for itself.
        found = self._summed

        def unpack(future: Any) -> Tensor:
            (summed,) = future.value()
            found.append(summed[-1])
            return buffer.copy_(summed[:-1])

        unpacked: torch.futures.Future[Tensor] = _sent(sent, self._group).then(unpack)
        return unpacked


class _Beside:
    """The count in an all-reduce of its own, begun before the gradients are sent and awaited after them."""

    def __init__(self, size: int, group: Any = None) -> None:
        self.sum_over = float(size)
        self._group = group
        self._count: Tensor | None = None
        self._work: Any = None

    def send(self, count: Count, device: torch.device) -> None:
        self._count = torch.empty(1, dtype=accumulator_dtype(device), device=device)
        self._count[0] = count
        self._work = dist.all_reduce(self._count, group=self._group, async_op=True)

    def total(self) -> Tensor:
        assert self._count is not None
        self._work.wait()
        return self._count[0]

    def forget(self) -> None:
        self._count = self._work = None


def _carrier(ddp: DistributedDataParallel, size: int) -> "_Bucket | _Beside":
    hooks = [getattr(hook, "__self__", None) for hook, _ in getattr(ddp, "_comm_hooks", ())]
    if hooks and isinstance(hooks[0], _Bucket):  # of another trainer of this model
        return hooks[0]
    is_exact = all(each.dtype in (torch.float32, torch.float64) for each in ddp.parameters() if each.requires_grad)
    if is_exact and not hooks and size > 1:
        with suppress(RuntimeError):  # a hook of C++'s, which DDP does not list
            return _Bucket(ddp, size)
    return _Beside(size, ddp.process_group)


def _sent(tensor: Tensor, group: Any) -> Any:
    work: Any = dist.all_reduce(tensor, group=group, async_op=True)
    return work.get_future()


def _first(future: Any) -> Tensor:
    tensors: list[Tensor] = future.value()
    return tensors[0]


@contextmanager
def _fsdp_no_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _ratio(above: Count, below: Count) -> Count:
    """`above / below`; 0 where nothing was counted, rather than infinite."""
    if isinstance(below, Tensor):
        return torch.where(below > 0, above / below, 0.0)
    if isinstance(above, Tensor):
        return above / below if below else 0.0
    return above / below if below else 0.0


def _multiply(gradients: list[Any], factor: Count) -> None:
    if isinstance(factor, Tensor):
        factor = factor.to(gradients[0].device, non_blocking=True)
    with torch.no_grad():
        locals_ = [each.to_local() if hasattr(each, "to_local") else each for each in gradients]
        if isinstance(factor, Tensor) and any(each.dtype != factor.dtype for each in locals_):
            for each in locals_:
                each.mul_(factor.to(each.dtype) if each.dtype.itemsize >= 4 else factor)
        else:
            torch._foreach_mul_(locals_, factor)
