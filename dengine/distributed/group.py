"""Opening and leaving the process group: the same `with` under torchrun, srun and plain python."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from dengine.distributed.collectives import barrier
from dengine.distributed.control import Control
from dengine.distributed.launch import Launch, find_launch
from dengine.distributed.world import World, default_device, enter, external_world, leave
from dengine.errors import LaunchError

__all__ = ["process_group"]

# By address: the store of a job, which outlives its groups, and how many of them this process has joined.
_stores: dict[str, tuple[Any, "count[int]"]] = {}


@contextmanager
def process_group(backend: str = "auto", timeout: float = 1800.0) -> Iterator[World]:
    """Join the other ranks for the length of a `with` block, and give this process's `World`.

    Finds a process group that is initialised already, else torchrun's variables, else SLURM's; without any of them
    this process is a world of one, and no group is made. Leaving it destroys what it created: after a barrier where
    all went well, and without waiting for anybody where this rank is failing.

    Args:
        backend: "auto" is NCCL for CUDA tensors with Gloo beside it for CPU tensors, and Gloo alone without CUDA;
            else one of torch's names.
        timeout: seconds after which a collective that others do not join fails.

    Raises:
        LaunchError: the launcher's variables are half set, or do not fit this machine.
        ValueError: `timeout` is not above 0.

    Cost: collective on entry and on exit; one process pays nothing.
    """
    if timeout <= 0:
        raise ValueError(f"timeout={timeout} must be a number of seconds above 0.")
    is_external = dist.is_available() and dist.is_initialized()
    launch = None if is_external else find_launch(os.environ)
    if launch is None:
        opened = external_world() if is_external else World(device=default_device(0))
    else:
        opened = _join(launch, backend, timeout)
    control = None if launch is None or launch.size == 1 else _control(launch, opened)
    enter(opened, control)
    try:
        yield opened
        if launch is not None:
            barrier("leave process_group")
    finally:
        leave()
        if control is not None:
            control.close()
        if launch is not None:
            dist.destroy_process_group()


def _join(launch: Launch, backend: str, timeout_s: float) -> World:
    device = _own_device(launch)
    if backend == "auto":
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=_store(launch, timeout_s),
        timeout=timedelta(seconds=timeout_s),
        rank=launch.rank,
        world_size=launch.size,
        # Binding the device lets NCCL connect at once, and tells a barrier where to run.
        device_id=device if "nccl" in backend else None,
    )
    return World(
        rank=launch.rank,
        size=launch.size,
        local_rank=launch.local_rank,
        local_size=launch.local_size,
        node_rank=launch.node_rank,
        device=device,
        backend=backend,
        launcher=launch.launcher,
    )


def _store(launch: Launch, timeout_s: float) -> Any:
    """Where the ranks of the next group find each other.

    Each group has a part of its own: in a common one, a rank would read the addresses that its peers had in the last.
    Under torchrun the store is the agent's; else rank 0 hosts it, once for all groups, as a second one on the same port
    could be taken for the first by a rank that comes early.
    """
    address = f"tcp://{launch.master_addr}:{launch.master_port}"
    if address not in _stores:
        timeout = timedelta(seconds=timeout_s)
        met = dist.rendezvous(address, launch.rank, launch.size, timeout=timeout)  # type: ignore[attr-defined]
        store, _, _ = next(iter(met))
        _stores[address] = (store, count())
    store, numbers = _stores[address]
    return PrefixStore(f"dengine/group/{next(numbers)}", store)


def _control(launch: Launch, here: World) -> Control:
    # A name of its own for each group: an agent's store outlives it, and keeps what an earlier one has said.
    holder = [uuid.uuid4().hex]
    dist.broadcast_object_list(holder, src=0)
    return Control(launch.master_addr, launch.master_port, f"dengine/{holder[0]}", here)


def _own_device(launch: Launch) -> torch.device:
    device = default_device(launch.local_rank)
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if device.index is not None and device.index >= num_devices:
            raise LaunchError(
                f"Rank {launch.rank} has local rank {launch.local_rank}, but its node shows {num_devices} GPUs: start "
                "one process per GPU (torchrun --nproc-per-node=gpu), and see that LOCAL_RANK is set."
            )
        torch.cuda.set_device(device)
    return device
