"""Send tensors and objects between the ranks of a world. In a world of one nothing is sent."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from dengine import trees
from dengine.comm.nested import grouped, split
from dengine.launch.world import World
from dengine.torch_internals import is_pending

__all__ = ["GroupTransport", "NoTransport", "Sources", "Transport"]

T = TypeVar("T")
# The sources of a broadcast: a rank in each of these groups, one broadcast after the other.
Sources: TypeAlias = Sequence[tuple[int, ProcessGroup | None]]


class Transport(Protocol):
    """Carries values between the ranks of a world, all of which make the same calls."""

    def device_for(self, device: torch.device) -> torch.device:
        """The device to which a tensor on `device` must be moved to be sent."""

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce `tensor` over all ranks, in place."""

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's bytes. Shapes: mine (sizes[rank],) uint8; result: one (sizes[r],) uint8 for each rank r."""

    def broadcast(self, tensors: list[torch.Tensor], within: Sources | None) -> None:
        """Overwrite `tensors` in place with rank 0's, packed; see `broadcast_tensors`."""

    def broadcast_one(self, tensor: torch.Tensor, within: Sources | None) -> None:
        """Overwrite `tensor` in place with rank 0's."""

    def all_gather_object(self, value: T) -> list[T]: ...

    def broadcast_object(self, value: T, source: int) -> T: ...


class NoTransport:
    """The transport of a world of one, which sends nothing."""

    def device_for(self, device: torch.device) -> torch.device:
        return device

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        pass

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [mine]

    def broadcast(self, tensors: list[torch.Tensor], within: Sources | None) -> None:
        pass

    def broadcast_one(self, tensor: torch.Tensor, within: Sources | None) -> None:
        pass

    def all_gather_object(self, value: T) -> list[T]:
        return [value]

    def broadcast_object(self, value: T, source: int) -> T:
        return value


class GroupTransport:
    """The transport through the default process group, and `cpu_group` for tensors on the CPU (None: the default,
    too).
    """

    def __init__(self, here: World, cpu_group: ProcessGroup | None) -> None:
        self._here = here
        self._cpu_group = cpu_group

    def device_for(self, device: torch.device) -> torch.device:
        has_gloo = "gloo" in self._here.backend or self._cpu_group is not None
        # A group of NCCL alone takes no CPU tensors.
        return self._here.device if device.type == "cpu" and not has_gloo else device

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        dist.all_reduce(tensor, op=op, group=self._group_for(tensor))

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        padded = mine.new_zeros(max(sizes))
        padded[: mine.numel()] = mine
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self._group_for(padded))
        return [row[:size] for row, size in zip(gathered, sizes, strict=True)]

    def broadcast(self, tensors: list[torch.Tensor], within: Sources | None) -> None:
        for indices in grouped(tensors).values():
            alike = [tensors[index].detach() for index in indices]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            sent = flat.to(self.device_for(flat.device))
            self._broadcast(sent, within)
            for tensor, part in zip(alike, split(sent.to(flat.device), alike), strict=True):
                tensor.copy_(part)

    def broadcast_one(self, tensor: torch.Tensor, within: Sources | None) -> None:
        own = tensor.detach()
        sent = own.to(self.device_for(own.device)).contiguous()
        self._broadcast(sent, within)
        if sent is not own:
            own.copy_(sent)

    def _broadcast(self, sent: torch.Tensor, within: Sources | None) -> None:
        for rank, members in [(0, self._group_for(sent))] if within is None else within:
            dist.broadcast(sent, src=rank, group=members)

    def all_gather_object(self, value: T) -> list[T]:
        value = _awaited(value)
        gathered = [value] * self._here.size
        dist.all_gather_object(gathered, value, group=self._cpu_group)
        return gathered

    def broadcast_object(self, value: T, source: int) -> T:
        holder = [_awaited(value)]
        dist.broadcast_object_list(holder, src=source, group=self._cpu_group)
        return holder[0]

    def _group_for(self, tensor: torch.Tensor) -> ProcessGroup | None:
        return self._cpu_group if tensor.device.type == "cpu" else None


def _awaited(value: T) -> T:
    """`value`, once no tensor in it is the result of a collective under way: its numbers would be sent too early."""
    if not any(is_pending(leaf) for leaf in trees.leaves(value)):
        return value
    return trees.map_leaves(lambda leaf: leaf.wait() if is_pending(leaf) else leaf, value)  # type: ignore[no-any-return]
