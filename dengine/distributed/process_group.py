"""Open and leave the process group: the same `with` under torchrun, srun and plain python."""

import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dengine.checks import number
from dengine.comm.collectives import all_gather_object
from dengine.control.ddp_errors import explain
from dengine.control.plane import NullPlane, Plane, plane
from dengine.control.sockets import abort_group, connect_neighbours, new_connections
from dengine.distributed.connect_errors import explaining_lost_rank, explaining_shared_gpu
from dengine.distributed.control_plane import gathered, open_plane, open_plane_beside
from dengine.distributed.mesh import Asked, asked_for, close_mesh, make_group_of_one, make_mesh
from dengine.errors import LaunchError, StallError
from dengine.launch.env import Launch, find_launch, is_agents_store
from dengine.launch.mesh import other_meshes_text
from dengine.launch.network import chosen_interface
from dengine.launch.parent_death import set_parent_death_signal
from dengine.launch.rendezvous import rendezvous
from dengine.launch.world import World, default_device, enter, external_world, leave, world, world_of
from dengine.torch_internals import PrefixStore, forget_meshes

__all__ = ["process_group"]

_MOST_MESHED = 64  # ranks: of more, each has connections to a few, and not to all


@contextmanager
def process_group(
    backend: str = "auto",
    timeout: float = 1800.0,
    stall_timeout: float = 600.0,
    *,
    mesh: Mapping[str, int] | DeviceMesh | None = None,
) -> Iterator[World]:
    """Join the other ranks for the length of a `with` block, and give this process's `World`.

    Uses a process group that is initialised already, else torchrun's variables, else SLURM's; without any of them this
    process is a world of one, and no group is made. At its end the block destroys what it created: once all ranks have
    come there if all went well, and without waiting for any rank if this one fails.

    A rank that torchrun started gets SIGTERM if that torchrun is killed, so that it does not go on training alone.

    Inside the block ranks leave together: if one raises, vanishes or hangs, all others raise an error that says what
    happened and where, also out of a collective of Gloo that they wait in, of this group or of one made inside the
    block (`new_group()`).

    On more than 64 ranks each has Gloo connections only to those that its collectives need (TORCH_GLOO_LAZY_INIT=1,
    unless that variable is set already).

    Args:
        backend: "auto" is NCCL for CUDA tensors with Gloo beside it for CPU tensors, and Gloo alone without CUDA;
            "none" makes this process a world of one, whatever started it (a sweep under srun); else one of torch's
            names.
        timeout: seconds after which a collective fails if ranks do not join it, and entering the block if ranks are
            missing.
        stall_timeout: seconds without progress on any rank, while a run is under way or a rank waits for the others in
            a collective of this package, on entering (30 s at least, as ranks begin at different times) or on leaving,
            after which the rank that the others wait for is named and all end. Iterations of any engine, handlers,
            collectives of this package and `distributed.progress()` are progress; the inside of `rank_zero_first()`
            may take as long as it likes. `math.inf`: never.
        mesh: the ranks as a grid, from the outermost dimension: sizes by name, of which one may be -1, or a
            `DeviceMesh` of all ranks, for which a process group must exist already. Ranks along `dp`,
            `dp_replicate`, `dp_shard` and `ep` get data of their own; those that differ only in `cp`, `tp` and `pp`
            get the same. `World.mesh`, `coordinates`, `data_rank` and `data_size` give the result.

    Raises:
        LaunchError: the launcher's variables are incomplete, or do not fit this machine; some ranks (they are named)
            have not come within `timeout`, or one ended meanwhile, or Gloo could not connect their hosts; two ranks
            have one GPU; they ask for different meshes; on leaving, the store is gone.
        TypeError, ValueError: a timeout is no number above 0; `mesh` is no mesh, has an unknown name, or the product of
            its sizes is not the number of ranks.
        StallError: on entering, some ranks have not come within `stall_timeout`.
        RemoteRankError, StallError: on leaving, if another rank failed.

    Cost: collective on entry; two threads that sleep (three if rank 0 hosts the store); nothing for a single process.
    """
    for name, value in (("timeout", timeout), ("stall_timeout", stall_timeout)):
        number(name, value, "a number of seconds above 0", above=0)
    is_alone = backend == "none"
    if is_alone and mesh is not None:
        raise ValueError("process_group('none') makes this process a world of one, which has no mesh: leave mesh= out.")
    asked = asked_for(mesh)
    is_external = dist.is_available() and dist.is_initialized() and not is_alone
    launch = None if is_external or is_alone else find_launch(os.environ)
    forget_meshes()  # of groups that were left: a new one may be equal to one of them
    own: Plane = NullPlane()  # the plane that this block closes
    if launch is not None:
        opened, own = _join(launch, backend, timeout, stall_timeout, asked)
    elif is_external:
        opened, own = _beside(asked, timeout, stall_timeout)
    else:
        opened = _alone(asked, backend, timeout)
    # Inside another block of the same group, the plane of that block is used, and stays open.
    enter(opened, plane() if is_external and own.group is None else own)
    is_failing = True
    try:
        yield opened
        own.leave_together()
        is_failing = False
    except BaseException as error:
        explain(error)
        raised = own.failed(error, sys._getframe())
        if raised is error:
            raise
        if raised.__cause__ is not None:  # a signal's handler raised it while `error` was being reported
            raise raised from raised.__cause__
        raise raised from None  # `error` is only a consequence of the other rank's failure
    finally:
        leave()
        group = own.group
        try:
            own.close(is_failing=is_failing)
        finally:
            if is_external:
                _leave_beside(opened, group, asked)
            elif opened.backend != "none":
                _destroy(opened, is_failing)


def _join(launch: Launch, backend: str, timeout_s: float, stall_timeout_s: float, asked: Asked) -> tuple[World, Plane]:
    """The world of the ranks that `launch` started, in a group that is made for it, and its control plane."""
    set_parent_death_signal(os.environ)
    opened, connections = _make_group(launch, backend, timeout_s, stall_timeout_s, asked)
    try:
        with explaining_lost_rank(launch):
            return opened, open_plane(launch, opened, connections, timeout_s, stall_timeout_s)
    except BaseException:  # else the next try would take the group for one that other code made
        _destroy(opened, is_failing=True)
        raise


def _destroy(opened: World, is_failing: bool) -> None:
    if is_failing and "nccl" in opened.backend:
        abort_group()  # destroying it would wait
    else:
        dist.destroy_process_group()


def _make_group(
    launch: Launch, backend: str, timeout_s: float, stall_timeout_s: float, asked: Asked
) -> tuple[World, list[socket.socket]]:
    device = _own_device(launch)
    backend = _backend_for(device, backend)
    if (interface := chosen_interface(os.environ, launch)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # Gloo reads it for each group that is made
    if launch.size > _MOST_MESHED:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # this one too
    try:
        store, name = rendezvous(launch, timeout_s, stall_timeout_s, mesh=asked.text)
    except (LaunchError, StallError) as error:
        if asked.refusal is not None:
            raise asked.refusal from error
        raise
    mesh = asked.fitted(launch.size)
    with (
        new_connections(launch.master_port) as connections,
        explaining_lost_rank(launch),
        explaining_shared_gpu(launch),
    ):
        dist.init_process_group(
            backend,
            store=PrefixStore(f"dengine/group/{name}", store),
            timeout=timedelta(seconds=timeout_s),
            rank=launch.rank,
            world_size=launch.size,
            # Binding the device lets NCCL connect at once, and tells a barrier where to run.
            device_id=device if "nccl" in backend else None,
        )
        connect_neighbours()
    try:
        with new_connections(launch.master_port) as of_mesh:
            made = make_mesh(mesh, device, timeout_s, connections)
    except BaseException:
        for each in connections:
            each.close()
        dist.destroy_process_group()
        raise
    return world_of(launch, device, backend, made), connections + of_mesh


def _alone(asked: Asked, backend: str, timeout_s: float) -> World:
    """A world of one; a mesh needs a group."""
    mesh, device = asked.fitted(1), default_device(0)
    if mesh is None:
        return World(device=device)
    backend = _backend_for(device, backend)
    make_group_of_one(backend)
    return World(device=device, backend=backend, mesh=make_mesh(mesh, device, timeout_s))


def _backend_for(device: torch.device, backend: str) -> str:
    if backend != "auto":
        return backend
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"


def _beside(asked: Asked, timeout_s: float, stall_timeout_s: float) -> tuple[World, Plane]:
    """This rank's world in a group that exists already, and a control plane if the group had none.

    Raises: LaunchError: the ranks ask for different meshes. TypeError, ValueError: for one that is none.
    """
    here = external_world()
    if plane().group is not None:  # inside another process_group()
        meshes = all_gather_object(asked.text) if asked.text else [""]
        is_shared = False
    else:
        is_shared, meshes = _first_exchange(here, asked.text)
    if refusal := other_meshes_text(meshes):
        raise asked.refusal or LaunchError(refusal)
    mesh = make_mesh(asked.fitted(here.size), here.device, timeout_s) if asked.text else world().mesh
    here = replace(here, mesh=mesh)
    return here, open_plane_beside(here, timeout_s, stall_timeout_s) if is_shared else NullPlane()


def _leave_beside(opened: World, group: dist.ProcessGroup | None, asked: Asked) -> None:
    """Destroy the groups that this block made beside the one that was there; `group` is its control plane's."""
    if group is not None:
        dist.destroy_process_group(group)
    if opened.mesh is not None and isinstance(asked.mesh, dict):
        close_mesh(opened.mesh)


def _first_exchange(here: World, mesh: str) -> tuple[bool, list[str]]:
    """Whether all ranks of a group that other code made reach the store of their launcher, and each rank's mesh."""
    launch = find_launch(os.environ)
    is_launched = launch is not None and (launch.rank, launch.size) == (here.rank, here.size)
    is_part = launch is not None and here.size < launch.size
    if is_part:
        assert launch is not None
        warnings.warn(
            f"This process group has {here.size} of the {launch.size} ranks that {_launcher_of(launch)} started: stops "
            "and failures are not shared beyond it, and metrics and checkpoints are those of its own ranks. If that "
            "is not intended, call process_group() before torch.distributed.init_process_group(), or make that group "
            "of all ranks.",
            stacklevel=5,
        )
    found = gathered((is_launched or (is_part and is_agents_store(os.environ)), mesh))
    return all(reaches for reaches, _ in found), [each for _, each in found]


def _launcher_of(launch: Launch) -> str:
    return "srun" if launch.launcher == "slurm" else launch.launcher


def _own_device(launch: Launch) -> torch.device:
    device = default_device(launch.device_index)
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if device.index is not None and device.index >= num_devices:
            raise LaunchError(
                f"Rank {launch.rank} has local rank {launch.local_rank}, but its node shows {num_devices} GPUs: start "
                "one process per GPU (torchrun --nproc-per-node=gpu), and see that LOCAL_RANK is set."
            )
        torch.cuda.set_device(device)
    return device
