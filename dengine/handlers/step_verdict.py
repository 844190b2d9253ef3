"""Whether the gradients of a step are finite, on any rank, with as few collectives and waits as possible."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dengine.distributed import world
from dengine.dtensor import local_part, summed_up
from dengine.parallel.gradients import find_ddp
from dengine.types import accumulator_dtype

__all__ = ["Reading", "Word", "are_finite", "is_bad_anywhere"]

_LARGE = (torch.float32, torch.float64)  # whose sums do not overflow where an element does not


class Word:
    """How a rank tells the others that its own loss is bad: by its gradients, if the step averages them anyway.

    With DDP, a NaN that a hook puts into the smallest gradient reaches all ranks in the all-reduce of the gradients.
    Otherwise (FSDP2, a mesh, gradients that the user averages) one number is reduced.

    Attributes:
        is_free: whether the gradients carry it, so that all ranks see the same.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.is_free = world().size == 1 or _averages_all(model, parameters)
        self._bad: bool | Tensor = False  # the loss of the step under way
        self._has_sent = False
        self._carrier: nn.Parameter | None = None
        if world().size > 1 and self.is_free:
            self._carrier = min((each for each in parameters if each.requires_grad), key=Tensor.numel)
            self._carrier.register_hook(self._mark)  # type: ignore[no-untyped-call]

    def announce(self, bad: bool | Tensor) -> None:
        """Say whether the loss of the step under way is bad, before its backward pass."""
        self._bad, self._has_sent = bad, False

    def check_sent(self) -> None:
        """Check that the others know of a bad loss. Raises: RuntimeError: the carrier got no gradient."""
        if self._carrier is not None and self._bad is True and not self._has_sent:
            raise RuntimeError(
                "The loss of this rank is bad, but the parameter whose gradient was to tell the other ranks got none: "
                "wrap a model with unused or frozen parameters by prepare_model(model, find_unused_parameters=True)."
            )

    def _mark(self, gradient: Tensor) -> Tensor | None:
        self._has_sent = True
        if isinstance(self._bad, Tensor):
            return torch.where(self._bad.to(gradient.device, non_blocking=True), math.nan, gradient)
        return torch.full_like(gradient, math.nan) if self._bad else None


class Reading:
    """A flag that is read later. On a CUDA device it is copied to the host meanwhile, and the device never waits."""

    def __init__(self, flag: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            self._flag = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._flag = flag

    def read(self) -> bool:
        """The flag. Waits for what was queued before it, not for what came after."""
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            self._event.synchronize()
        return bool(self._flag.tolist())


def are_finite(gradients: Iterable[Tensor]) -> bool | Tensor:
    """Whether all elements of this rank's parts are finite: on the CPU a bool, else a tensor on the device.

    Cost: reads each gradient once; no wait for a device.
    """
    parts = [each if type(each) is Tensor and each.layout is torch.strided else _dense(each) for each in gradients]
    if all(each.is_cpu for each in parts):
        # A sum is quick, and not finite if an element is not; if it only overflows, a closer look says so.
        for each in parts:
            found: Any = each.sum(dtype=None if each.dtype in _LARGE else _wide(each)).tolist()
            if not math.isfinite(abs(found)) and not torch.isfinite(each).all().tolist():
                return False
        return True
    parts = [each for each in parts if each.numel()]
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for each in parts:
        kinds.setdefault((each.device, each.dtype), []).append(each)
    device = parts[0].device
    largest = [torch.stack(torch._foreach_norm(some, math.inf)).amax() for some in kinds.values()]
    together = torch.stack([each.to(device, accumulator_dtype(device), non_blocking=True) for each in largest])
    return torch.isfinite(together).all()


def is_bad_anywhere(bad: bool | Tensor) -> bool | Tensor:
    """Whether it is bad on any rank. Collective: one all-reduce of one number; on a device the host does not wait."""
    device = world().device
    flag = torch.zeros(1, device=device)
    flag[0] = bad.to(device, non_blocking=True) if isinstance(bad, Tensor) else float(bad)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.tolist()[0]) if flag.is_cpu else flag[0] > 0


def _averages_all(model: nn.Module, parameters: list[nn.Parameter]) -> bool:
    """Whether DDP averages the gradients of all `parameters` over all ranks in each step."""
    ddp = find_ddp(model)
    if ddp is None or dist.get_world_size(ddp.process_group) < world().size or ddp.find_unused_parameters:
        return False
    inside = {id(each) for name, each in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}
    trained = [each for each in parameters if each.requires_grad]
    return bool(trained) and all(id(each) in inside for each in trained)


def _dense(gradient: Tensor) -> Tensor:
    part = local_part(summed_up(gradient))
    return part._values() if part.is_sparse else part


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
