"""Open the control plane: for a process group that this package made, or for one that existed before."""

import os
import socket
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import DistError

from dengine.control.channel import StoreEndpoint
from dengine.control.context import ControlContext
from dengine.control.control import Control
from dengine.control.plane import NullPlane, Plane
from dengine.control.sockets import Connections, connect_neighbours, existing_connections, new_connections
from dengine.launch.env import Launch, find_launch, is_agents_store
from dengine.launch.process import identity
from dengine.launch.world import World

__all__ = ["gathered", "open_plane", "open_plane_beside"]

T = TypeVar("T")


def open_plane(
    launch: Launch, here: World, connections: list[socket.socket], timeout_s: float, stall_timeout_s: float
) -> Plane:
    """The control plane of the ranks that `launch` started, its threads running; `connections` are the group's."""
    plane = _plane(launch, here, connections, timeout_s, stall_timeout_s)
    plane.start()
    return plane


def open_plane_beside(here: World, timeout_s: float, stall_timeout_s: float) -> Plane:
    """The control plane for a group that other code made, if its ranks reach the store of their launcher."""
    launch = find_launch(os.environ)
    assert launch is not None
    connections = existing_connections(gathered, launch.master_port)
    plane: Plane | None = None
    with suppress(DistError):  # the store of the launcher cannot be reached
        plane = _plane(launch, here, connections, timeout_s, stall_timeout_s)
    is_reached = all(gathered(plane is not None))
    if plane is None or not is_reached:
        return NullPlane()
    plane.start()
    return plane


def gathered(value: T) -> list[T]:
    """Every rank's `value`, through the default group: nothing else exists yet."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _plane(
    launch: Launch, here: World, connections: list[socket.socket], timeout_s: float, stall_timeout_s: float
) -> Plane:
    if here.size == 1:
        for each in connections:
            each.close()
        return NullPlane()
    # A name of its own for each group: an agent's store outlives it, and keeps what an earlier one has said.
    holder: list[Any] = [uuid.uuid4().hex, identity()]
    with new_connections(launch.master_port) as gloo_connections:
        dist.broadcast_object_list(holder, src=0)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        connect_neighbours(group)
    name, host_process = holder
    is_hosted = not is_agents_store(os.environ)
    endpoint = StoreEndpoint(launch.master_addr, launch.master_port, f"dengine/{name}", is_hosted)
    all_connections = Connections([*connections, *gloo_connections])
    return Control(ControlContext(here, endpoint, all_connections, group, host_process), stall_timeout_s)
