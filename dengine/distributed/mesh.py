"""Check `process_group(mesh=)`, and make the mesh once the group exists."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dengine.control.sockets import connect_neighbours, unless_hung_up
from dengine.errors import LaunchError
from dengine.launch.mesh import NAMES, checked_sizes, filled_sizes, shown_sizes
from dengine.torch_internals import HashStore, set_timeout

__all__ = ["Asked", "Mesh", "asked_for", "close_mesh", "make_group_of_one", "make_mesh"]

Mesh: TypeAlias = dict[str, int] | DeviceMesh | None  # what was asked for, checked


@dataclass(frozen=True)
class Asked:
    """What one rank asks for by `mesh=`: a mesh, or what is none (`refusal`), of which the other ranks must learn."""

    mesh: Mesh = None
    refusal: TypeError | ValueError | None = None

    @property
    def text(self) -> str:
        """In one line, the same on all ranks if they mean the same; "" if there is no mesh."""
        if self.refusal is not None:
            return str(self.refusal)
        if isinstance(self.mesh, DeviceMesh):
            return f"{self.mesh} of ranks {self.mesh.mesh.tolist()}"
        return "" if self.mesh is None else shown_sizes(self.mesh)

    def fitted(self, num_ranks: int) -> Mesh:
        """The mesh for so many ranks, all of which ask for the same.

        Raises: TypeError, ValueError: it is none, or the product of its sizes is not the number of ranks.
        """
        if self.refusal is not None:
            raise self.refusal
        return filled_sizes(self.mesh, num_ranks) if isinstance(self.mesh, dict) else self.mesh


def asked_for(mesh: Mapping[str, int] | DeviceMesh | None) -> Asked:
    """`mesh=`, checked as far as it can be before the ranks have met. What is none is for them to refuse together."""
    try:
        return Asked(_checked(mesh))
    except (TypeError, ValueError) as error:
        return Asked(refusal=error)


def _checked(mesh: Mapping[str, int] | DeviceMesh | None) -> Mesh:
    if mesh is None:
        return None
    if isinstance(mesh, Mapping):
        return checked_sizes(mesh)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh= takes the sizes of its dimensions by name, as {{'dp_shard': -1, 'tp': 2}}, or a torch DeviceMesh, "
            f"but got {mesh!r}."
        )
    if mesh.mesh_dim_names is None:
        raise ValueError(
            f"mesh= is a {mesh} without names, which say what its ranks share: pass init_device_mesh(..., "
            f"mesh_dim_names=(...)), of {', '.join(NAMES)}."
        )
    if not dist.is_initialized():
        raise ValueError(
            f"mesh= is a {mesh}, but there is no process group that its own could be of: pass the sizes by name, and "
            "process_group() makes both."
        )
    checked_sizes(dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)))
    if mesh.size() != dist.get_world_size() or mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh= is a {mesh} of {mesh.size()} ranks, but there are {dist.get_world_size()}, and it needs them all."
        )
    return mesh


def make_mesh(
    mesh: Mesh, device: torch.device, timeout_s: float, peers: Sequence[socket.socket] = ()
) -> DeviceMesh | None:
    """Make the mesh over the ranks of the default group, which has the connections `peers`. `mesh` fits them.

    Collective: call on all ranks with the same `mesh`. Cost: a group for each dimension.

    Raises: LaunchError: another rank's process has ended meanwhile. torch would wait for it for half an hour.
    """
    if not isinstance(mesh, dict):
        return mesh

    def make() -> DeviceMesh:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own current device
        made = init_device_mesh(device.type, tuple(mesh.values()), mesh_dim_names=tuple(mesh))
        for group in made.get_all_groups():
            connect_neighbours(group)
        return made

    try:
        made = unless_hung_up(make, peers)
    except ConnectionError as error:
        raise LaunchError(
            f"Rank {dist.get_rank()} of {dist.get_world_size()} lost another rank while process_group() made its mesh: "
            "its process ended (killed, or by an error that it printed)."
        ) from error
    for group in made.get_all_groups():
        if group is not dist.group.WORLD:
            set_timeout(group, timedelta(seconds=timeout_s))
    return made


def close_mesh(mesh: DeviceMesh) -> None:
    """Destroy the groups of a mesh that `make_mesh` made, the last one first. The default group stays."""
    for group in reversed(mesh.get_all_groups()):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def make_group_of_one(backend: str) -> None:
    """Make a process group of this process alone: a mesh needs a group."""
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
