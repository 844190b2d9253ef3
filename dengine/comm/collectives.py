"""Every collective of the package. One place, so that it can be refused if only rank 0 runs it.

A lone process runs the same code, and gets its own values back.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dengine import trees
from dengine.comm.nested import ReduceOp, flatten, grouped, signature, split
from dengine.comm.rank_zero import refuse_on_rank_zero_alone
from dengine.control.failure import repr_of
from dengine.control.plane import plane
from dengine.dtensor import any_dtensor, is_dtensor, may_be_dtensors, whole
from dengine.errors import RemoteRankError
from dengine.launch.world import World, refuse_forgotten_group, world

__all__ = [
    "ReduceOp",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast_each",
    "broadcast_object",
    "broadcast_tensors",
    "collective",
    "gather_bytes",
    "max_tensor",
    "progress",
    "rank_zero_first",
    "sum_tensor",
    "whole_tensor",
    "whole_tensors",
]

T = TypeVar("T")

_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


# -- rank 0 first ------------------------------------------------------------------------------------------------


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the body on rank 0 first, and on the others once rank 0 has finished it: to prepare a data set, say.

    It may take longer than the `stall_timeout` of `process_group()`.

    Collective: enter it on all ranks. Cost: one object broadcast; two requests to the store.

    Raises:
        RemoteRankError: on the other ranks, if the body failed on rank 0.
        LaunchError: a launcher started several processes, but no process group is open.
    """
    refuse_forgotten_group("rank_zero_first()")
    if world().rank == 0:
        failure: str | None = "left by an exception that is no Exception"
        try:
            with plane().exempt():
                yield
            failure = None
        except Exception as error:
            failure = repr_of(error)
            raise
        finally:
            broadcast_object(failure)
        return
    failure = broadcast_object(None)
    if failure is not None:
        raise RemoteRankError(f"Rank 0 failed inside rank_zero_first(), so this rank stops too: {failure}", rank=0)
    with plane().exempt():
        yield


@contextmanager
def collective(what: str, *, site: str = "") -> Iterator[Any]:
    """Enter a collective, unless only rank 0 runs here or a rank has failed, and compare it with the others' calls.

    Gives the group for tensors on the CPU; None is the default group.
    """
    refuse_on_rank_zero_alone(what)
    here = plane()
    here.enter_call(what, site)
    try:
        yield here.group
    finally:
        here.leave_call()


def _group_of(tensor: torch.Tensor, cpu_group: Any) -> Any:
    return cpu_group if tensor.device.type == "cpu" else None


def progress() -> None:
    """Report that this rank is at work: call it now and then in a step or a handler that may take longer than
    `stall_timeout`. Never communicates. Iterations of any engine, handlers and collectives are progress by themselves.
    """
    plane().tick()


# -- values ------------------------------------------------------------------------------------------------------


def all_reduce(value: T, op: ReduceOp = "sum", *, name: str | None = None) -> T:
    """`value` reduced over all ranks: a number, a tensor, or nested containers of them.

    A container is a dict or another mapping, a list, a tuple, a named tuple or a dataclass, and comes back as one.

    Collective: call on all ranks with the same structure, from the same line or with the same `name`: two ranks that
    reduce different things at a time (one its loss, the other its accuracy) are told apart by that. The same types,
    dtypes and devices come back as went in; the input is left alone. A DTensor is taken as the whole tensor, and comes
    back as a plain one. Cost: one all-reduce per dtype and device, and one request to the store; a gather for each
    DTensor.

    Raises:
        ValueError: an unknown `op`; the mean of whole numbers, which would not be one.
        TypeError: a leaf that is neither a number nor a tensor.
        ConsistencyError: another rank calls something else; both call sites are named.
        LaunchError: a launcher started several processes, but no process group is open.
    """
    refuse_forgotten_group("all_reduce()")
    if op not in _OPS:
        raise ValueError(f"op={op!r} must be one of {', '.join(_OPS)}.")
    leaves: list[torch.Tensor] = []
    rebuild = flatten(value, leaves, op)
    with collective(f"all_reduce({name or signature(value)}, {op!r})", site=name or plane().call_site()) as group:
        return rebuild(_reduced([whole(leaf) for leaf in leaves], op, group))  # type: ignore[no-any-return]


def whole_tensor(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """`tensor`, or all of it where it is a DTensor. Collective then: a gather over the ranks of its mesh.

    Raises: RankZeroCollectiveError: it is a DTensor, and only rank 0 runs here.
    """
    if is_dtensor(tensor):
        refuse_on_rank_zero_alone(f"{what} of a DTensor")
    return whole(tensor)


def whole_tensors(value: T, what: str) -> T:
    """`value` with the whole tensor for each DTensor in it, however nested. Collective where there is one.

    Cost: nothing where nobody has imported DTensor; otherwise a look at each leaf.

    Raises: RankZeroCollectiveError: as `whole_tensor`.
    """
    if not may_be_dtensors() or not any_dtensor(trees.leaves(value)):
        return value
    refuse_on_rank_zero_alone(f"{what} of a DTensor")
    with torch.no_grad():
        return trees.map_leaves(whole, value)  # type: ignore[no-any-return]


def all_gather_object(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks. Collective. The value must pickle. Cost: two small gathers."""
    with collective("all_gather_object") as group:
        if world().size == 1:
            return [value]
        gathered: list[Any] = [None] * world().size
        dist.all_gather_object(gathered, value, group=group)
        return gathered


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank `source`'s `value`, on every rank. Collective. The value must pickle. Cost: two small broadcasts."""
    with collective(f"broadcast_object from rank {source}") as group:
        if world().size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=source, group=group)
        return holder[0]


def barrier(name: str = "barrier") -> None:
    """Wait until every rank is here. Collective. `name` says where, for whoever looks at a hang. Cost: one all-reduce.

    Raises:
        RankZeroCollectiveError: only rank 0 runs here.
        LaunchError: a launcher started several processes, but no process group is open.
    """
    refuse_forgotten_group("barrier()")
    with collective(f"barrier({name!r})") as group:
        if world().size > 1:
            # An all-reduce of one number rather than dist.barrier(): that one picks a device of its own with NCCL.
            _sum(torch.zeros(1, device=_transport(torch.device("cpu"))), group)


def broadcast_tensors(
    tensors: list[torch.Tensor], source: int = 0, *, within: Sequence[tuple[int, Any]] | None = None
) -> None:
    """Overwrite `tensors` in place with rank `source`'s. Collective. Cost: one broadcast per dtype and device.

    Args:
        within: pairs of a rank and a group that it is in, in place of `source` and all ranks: one broadcast after the
            other, in each of which this rank's group takes part.
    """
    # Within a mesh, other ranks may have other tensors.
    start = f"{len(tensors)} tensors) from rank {source}" if within is None else "...) within a mesh"
    with collective(f"broadcast_tensors({start}") as group:
        if world().size == 1:
            return
        for indices in grouped(tensors).values():
            alike = [tensors[index].detach() for index in indices]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            sent = flat.to(_transport(flat.device))
            for rank, members in [(source, _group_of(sent, group))] if within is None else within:
                dist.broadcast(sent, src=rank, group=members)
            for tensor, part in zip(alike, split(sent.to(flat.device), alike), strict=True):
                tensor.copy_(part)


def broadcast_each(tensors: Iterable[torch.Tensor], *, within: Sequence[tuple[int, Any]] | None = None) -> None:
    """Overwrite each of `tensors` in place with rank 0's, one after the other as they are given.

    Collective: as many tensors on all ranks, of the same shapes. Cost: a broadcast of each; no memory beside it.

    Args:
        within: as of `broadcast_tensors`.
    """
    with collective("broadcast_each of a model's tensors") as group:
        for tensor in tensors:
            own = tensor.detach()
            sent = own.to(_transport(own.device)).contiguous()
            if world().size > 1:
                for rank, members in [(0, _group_of(sent, group))] if within is None else within:
                    dist.broadcast(sent, src=rank, group=members)
            if sent is not own:
                own.copy_(sent)


# -- for the packed reduction of metrics -------------------------------------------------------------------------


def sum_tensor(tensor: torch.Tensor, here: World, *, what: str = "the sum of the metrics") -> torch.Tensor:
    """The sum over the ranks of `here`, in place. Collective: one all-reduce."""
    if here.size > 1:
        with collective(f"{what}, {tensor.numel()} numbers") as group:
            _sum(tensor, group)
    return tensor


def max_tensor(tensor: torch.Tensor, here: World, *, what: str = "the extrema of the metrics") -> torch.Tensor:
    """The maximum over the ranks of `here`, in place. Collective: one all-reduce."""
    if here.size > 1:
        with collective(f"{what}, {tensor.numel()} numbers") as group:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_group_of(tensor, group))
    return tensor


def gather_bytes(mine: torch.Tensor, sizes: list[int], here: World) -> list[torch.Tensor]:
    """Every rank's bytes. Collective: one gather, padded to the longest.

    Shapes: mine (sizes[rank],) uint8; result: one (sizes[r],) uint8 for each rank r.
    """
    if here.size == 1:
        return [mine]
    longest = max(sizes)
    if longest == 0:
        return [mine] * len(sizes)
    padded = mine.new_zeros(longest)
    padded[: mine.numel()] = mine
    gathered = [torch.empty_like(padded) for _ in sizes]
    with collective(f"the gather of the metrics, {longest} bytes") as group:
        dist.all_gather(gathered, padded, group=_group_of(padded, group))
    return [row[:size] for row, size in zip(gathered, sizes, strict=True)]


# -- helpers -----------------------------------------------------------------------------------------------------


def _transport(device: torch.device) -> torch.device:
    """The device on which a tensor of `device` must lie to be sent: a group of NCCL alone takes no CPU tensors."""
    here = world()
    has_gloo = "gloo" in here.backend or plane().group is not None
    return here.device if device.type == "cpu" and not has_gloo and here.size > 1 else device


def _sum(tensor: torch.Tensor, cpu_group: Any) -> None:
    dist.all_reduce(tensor, group=_group_of(tensor, cpu_group))


def _reduced(leaves: list[torch.Tensor], op: ReduceOp, cpu_group: Any) -> list[torch.Tensor]:
    reduced = list(leaves)
    for indices in grouped(leaves).values():
        alike = [leaves[index] for index in indices]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        sent = flat.to(_transport(flat.device), torch.uint8 if flat.dtype == torch.bool else flat.dtype)
        if world().size > 1:
            dist.all_reduce(sent, op=_OPS[op], group=_group_of(sent, cpu_group))
        if op == "mean":
            sent = sent / world().size
        for index, part in zip(indices, split(sent.to(flat.device, flat.dtype), alike), strict=True):
            reduced[index] = part
    return reduced
