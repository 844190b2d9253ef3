"""Every collective of the package, in one place, so that each can be refused if only rank 0 would run it.

A lone process runs the same code, and gets its own values back.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from dengine import trees
from dengine.comm.nested import ReduceOp, flatten, grouped, signature, split
from dengine.comm.transport import GroupTransport, NoTransport, Sources, Transport
from dengine.comm.waits import waiting
from dengine.control.failure import repr_of
from dengine.control.plane import plane
from dengine.dtensor import any_dtensor, is_dtensor, may_be_dtensors, whole
from dengine.errors import RemoteRankError
from dengine.launch.world import World, refuse_forgotten_group, refuse_on_rank_zero_alone, world, world_for

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
    "gather_objects",
    "max_tensor",
    "progress",
    "rank_zero_first",
    "share_object",
    "sum_tensor",
    "whole_tensor",
    "whole_tensors",
]

T = TypeVar("T")

_NO_TRANSPORT = NoTransport()
_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


# -- rank 0 first ------------------------------------------------------------------------------------------------


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the body on rank 0 first, and on the others once rank 0 has finished: for example, to prepare a data set.

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


def collective(what: str, *, site: str = "") -> AbstractContextManager[Transport]:
    """Enter a collective, and check that the other ranks call the same one. Gives the transport between the ranks.

    Refuses to enter if only rank 0 runs this code, or if a rank has failed.
    """
    return _among(world_for(what), what, site)


@contextmanager
def _among(here: World, what: str, site: str = "") -> Iterator[Transport]:
    """Enter a collective of the ranks of `here`. In a world of one, there is nothing to enter."""
    if here.size == 1:
        yield _NO_TRANSPORT
        return
    refuse_on_rank_zero_alone(what)
    open_plane = plane()
    open_plane.enter_call(what, site)
    try:
        with waiting:
            yield GroupTransport(here, open_plane.group)
    finally:
        open_plane.leave_call()


def progress() -> None:
    """Report that this rank is at work: call it now and then in a step or a handler that may take longer than
    `stall_timeout`. Never communicates. Iterations of any engine, handlers and collectives are progress by themselves.
    """
    plane().tick()


# -- values ------------------------------------------------------------------------------------------------------


def all_reduce(value: T, op: ReduceOp = "sum", *, name: str | None = None) -> T:
    """`value` reduced over all ranks: a number, a tensor, or nested containers of them.

    A container is a dict or another mapping, a list, a tuple, a named tuple or a dataclass, and comes back as one.

    Collective: call on all ranks with the same structure, from the same line or with the same `name`, so that ranks
    that reduce different things (one its loss, the other its accuracy) get an error. Types, dtypes and devices of the
    result are those of the input, which is not changed. A DTensor is reduced as the whole tensor, and comes back as a
    plain one. Cost: one all-reduce per dtype and device, and one request to the store; a gather for each
    DTensor.

    Raises:
        ValueError: an unknown `op`; the mean of whole numbers, which may not be a whole number.
        TypeError: a leaf that is neither a number nor a tensor.
        ConsistencyError: another rank calls something else; both call sites are named.
        LaunchError: a launcher started several processes, but no process group is open.
    """
    refuse_forgotten_group("all_reduce()")
    if op not in _OPS:
        raise ValueError(f"op={op!r} must be one of {', '.join(_OPS)}.")
    leaves: list[torch.Tensor] = []
    rebuild = flatten(value, leaves, op)
    with collective(f"all_reduce({name or signature(value)}, {op!r})", site=name or plane().call_site()) as transport:
        return rebuild(_reduced([whole(leaf) for leaf in leaves], op, transport))  # type: ignore[no-any-return]


def whole_tensor(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The whole of `tensor`, as a plain tensor. Collective if it is a DTensor: a gather over the ranks of its mesh.

    Raises: RankZeroCollectiveError: it is a DTensor, and only rank 0 runs here.
    """
    if is_dtensor(tensor):
        refuse_on_rank_zero_alone(f"{what} of a DTensor")
    return whole(tensor)


def whole_tensors(value: T, what: str) -> T:
    """`value` with each DTensor in it, however nested, replaced by the whole tensor. Collective if there is one.

    Cost: nothing if nobody has imported DTensor; otherwise a look at each leaf.

    Raises: RankZeroCollectiveError: as `whole_tensor`.
    """
    if not may_be_dtensors() or not any_dtensor(trees.leaves(value)):
        return value
    refuse_on_rank_zero_alone(f"{what} of a DTensor")
    with torch.no_grad():
        return trees.map_leaves(whole, value)  # type: ignore[no-any-return]


def all_gather_object(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks. Collective. The value must pickle. Cost: two small gathers."""
    return gather_objects(value, world_for("all_gather_object"))


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank `source`'s `value`, on every rank. Collective. The value must pickle. Cost: two small broadcasts."""
    return share_object(value, world_for(f"broadcast_object from rank {source}"), source)


def barrier(name: str = "barrier") -> None:
    """Wait until every rank is here. Collective. Error messages about a hang show `name`. Cost: one all-reduce.

    Raises:
        RankZeroCollectiveError: only rank 0 runs here.
        LaunchError: a launcher started several processes, but no process group is open.
    """
    refuse_forgotten_group("barrier()")
    with collective(f"barrier({name!r})") as transport:
        # An all-reduce of one number rather than dist.barrier(): that one picks a device of its own with NCCL.
        transport.all_reduce(torch.zeros(1, device=transport.device_for(torch.device("cpu"))))


def broadcast_tensors(tensors: list[torch.Tensor], *, within: Sources | None = None) -> None:
    """Overwrite `tensors` in place with rank 0's. Collective. Cost: one broadcast per dtype and device.

    Args:
        within: pairs of a source rank and its group, instead of rank 0 and all ranks. Each group does one broadcast
            after the other.
    """
    # Within a mesh, other ranks may have other tensors.
    start = f"{len(tensors)} tensors) from rank 0" if within is None else "...) within a mesh"
    with collective(f"broadcast_tensors({start}") as transport:
        transport.broadcast(tensors, within)


def broadcast_each(tensors: Iterable[torch.Tensor], *, within: Sources | None = None) -> None:
    """Overwrite each of `tensors` in place with rank 0's, one at a time.

    Collective: as many tensors on all ranks, of the same shapes. Cost: a broadcast of each; no memory beside it.

    Args:
        within: as of `broadcast_tensors`.
    """
    with collective("broadcast_each of a model's tensors") as transport:
        for tensor in tensors:
            transport.broadcast_one(tensor, within)


# -- for those who have the world already ------------------------------------------------------------------------


def sum_tensor(tensor: torch.Tensor, here: World, *, what: str = "the sum of the metrics") -> torch.Tensor:
    """The sum over the ranks of `here`, in place. Collective: one all-reduce."""
    with _among(here, f"{what}, {tensor.numel()} numbers") as transport:
        transport.all_reduce(tensor)
    return tensor


def max_tensor(tensor: torch.Tensor, here: World, *, what: str = "the extrema of the metrics") -> torch.Tensor:
    """The maximum over the ranks of `here`, in place. Collective: one all-reduce."""
    with _among(here, f"{what}, {tensor.numel()} numbers") as transport:
        transport.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_objects(value: T, here: World) -> list[T]:
    """The `value` of every rank of `here`. Collective. Cost: two small gathers."""
    with _among(here, "all_gather_object") as transport:
        return transport.all_gather_object(value)


def share_object(value: T, here: World, source: int = 0) -> T:
    """Rank `source`'s `value`, on every rank of `here`. Collective. Cost: two small broadcasts."""
    with _among(here, f"broadcast_object from rank {source}") as transport:
        return transport.broadcast_object(value, source)


def gather_bytes(mine: torch.Tensor, sizes: list[int], here: World) -> list[torch.Tensor]:
    """Every rank's bytes. Collective: one gather, padded to the longest.

    Shapes: mine (sizes[rank],) uint8; result: one (sizes[r],) uint8 for each rank r.
    """
    longest = max(sizes)
    if longest == 0:
        return [mine] * len(sizes)
    with _among(here, f"the gather of the metrics, {longest} bytes") as transport:
        return transport.all_gather(mine, sizes)


# -- helpers -----------------------------------------------------------------------------------------------------


def _reduced(leaves: list[torch.Tensor], op: ReduceOp, transport: Transport) -> list[torch.Tensor]:
    reduced = list(leaves)
    for indices in grouped(leaves).values():
        alike = [leaves[index] for index in indices]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        sent = flat.to(transport.device_for(flat.device), torch.uint8 if flat.dtype == torch.bool else flat.dtype)
        transport.all_reduce(sent, _OPS[op])
        if op == "mean":
            sent = sent / world().size
        for index, part in zip(indices, split(sent.to(flat.device, flat.dtype), alike), strict=True):
            reduced[index] = part
    return reduced
