"""Opening the control plane: of a process group that this package made, or beside one that was there."""

import atexit
import os
import socket
import uuid
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import DistError

from dengine.control.channel import ControlContext, StoreEndpoint
from dengine.control.plane import Control, NullPlane, Plane
from dengine.control.sockets import Connections, existing_connections, new_connections
from dengine.launch.env import Launch, find_launch, is_agents_store
from dengine.launch.process import identity
from dengine.launch.world import World

__all__ = ["gathered", "open_plane", "open_plane_beside"]

T = TypeVar("T")


def open_plane(
    launch: Launch, here: World, connections: list[socket.socket], timeout_s: float, stall_timeout_s: float
) -> Plane:
    """The control plane of the ranks that `launch` started, its threads running; `connections` are the group's."""
    if launch.size == 1:
        for each in connections:
            each.close()
        return NullPlane()
    return _started(_control(launch, here, connections, timeout_s, stall_timeout_s))


def open_plane_beside(here: World, timeout_s: float, stall_timeout_s: float) -> Plane:
    """The control plane for a group that somebody else made, whose ranks reach the store of their launcher."""
    launch = find_launch(os.environ)
    assert launch is not None
    connections = existing_connections(gathered, launch.master_port)
    control = None
    with suppress(DistError):  # the store of the launcher is not reached
        control = _control(launch, here, connections, timeout_s, stall_timeout_s)
    is_reached = all(gathered(control is not None))
    return _started(control) if control is not None and is_reached else NullPlane()


def gathered(value: T) -> list[T]:
    """Every rank's `value`, through the default group: before there is anything else."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _control(
    launch: Launch, here: World, connections: list[socket.socket], timeout_s: float, stall_timeout_s: float
) -> Control:
    # A name of its own for each group: an agent's store outlives it, and keeps what an earlier one has said.
    holder: list[Any] = [uuid.uuid4().hex, identity()]
    dist.broadcast_object_list(holder, src=0)
    name, host_process = holder
    is_hosted = not is_agents_store(os.environ)
    endpoint = StoreEndpoint(launch.master_addr, launch.master_port, f"dengine/{name}", is_hosted)
    with new_connections(launch.master_port) as gloo_connections:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    all_connections = Connections([*connections, *gloo_connections])
    context = ControlContext(here, endpoint, endpoint.connect(), all_connections, group, host_process)
    return Control(context, stall_timeout_s)


def _started(control: Control) -> Control:
    control.start()
    # If the block is never left (in a notebook), the threads must be gone before the interpreter is.
    atexit.register(_end_at_exit, weakref.ref(control))
    return control


def _end_at_exit(control: "weakref.ref[Control]") -> None:
    if (here := control()) is not None:
        here.end_threads(is_failing=True)
