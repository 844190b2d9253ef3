"""Opening and leaving the process group: the same `with` under torchrun, srun and plain python."""

import atexit
import os
import socket
import sys
import uuid
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import DistError
from torch.distributed.device_mesh import DeviceMesh

from dengine.checks import number
from dengine.comm.collectives import all_gather_object
from dengine.control.channel import ControlContext, StoreEndpoint
from dengine.control.ddp_errors import explain
from dengine.control.failure import is_of_backend, line_of, traceback_of, write_error_file
from dengine.control.plane import Control, NullPlane, plane
from dengine.control.sockets import Connections, abort_group, existing_connections, new_connections
from dengine.control.undisturbed import undisturbed
from dengine.control.watchdog import Watchdog
from dengine.distributed.mesh import Mesh, as_text, checked_mesh, close_mesh, fitted_mesh, make_group_of_one, make_mesh
from dengine.errors import LaunchError
from dengine.launch.env import Launch, find_launch, is_agents_store
from dengine.launch.mesh import other_meshes_text
from dengine.launch.network import chosen_interface
from dengine.launch.parent_death import set_parent_death_signal
from dengine.launch.process import identity
from dengine.launch.rendezvous import rendezvous
from dengine.launch.world import World, default_device, enter, external_world, leave, world
from dengine.torch_internals import PrefixStore

__all__ = ["process_group"]

T = TypeVar("T")


@contextmanager
def process_group(
    backend: str = "auto",
    timeout: float = 1800.0,
    stall_timeout: float = 600.0,
    *,
    mesh: Mapping[str, int] | DeviceMesh | None = None,
) -> Iterator[World]:
    """Join the other ranks for the length of a `with` block, and give this process's `World`.

    Finds a process group that is initialised already, else torchrun's variables, else SLURM's; without any of them
    this process is a world of one, and no group is made. Leaving it destroys what it created: once all ranks are
    there if all went well, and without waiting for any if this rank is failing.

    A rank that torchrun started gets SIGTERM if that torchrun is killed: it does not train on unwatched.

    Inside it ranks leave together: if one raises, vanishes or hangs, all others raise what happened and where. A rank
    that waits in a group made inside the block (`new_group()`) cannot be freed: within a run its process is
    ended, with the same message; outside of one it gets an error when the failed rank's process ends.

    Args:
        backend: "auto" is NCCL for CUDA tensors with Gloo beside it for CPU tensors, and Gloo alone without CUDA;
            "none" makes this process a world of one, whatever started it (a sweep under srun); else one of torch's
            names.
        timeout: seconds after which a collective fails that others do not join, and entering if ranks are missing.
        stall_timeout: seconds without progress on any rank, while a run is under way or a rank waits for the others in
            a collective of this package, on entering (30 s at least, as ranks begin at different times) or on leaving,
            after which the rank that the others wait for is named and all end. Iterations of any engine, handlers,
            collectives of this package and `distributed.progress()` are progress; the inside of `rank_zero_first()`
            may take as long as it likes. `math.inf`: never.
        mesh: the ranks as a grid, from the outermost dimension: sizes by name, of which one may be -1, or a
            `DeviceMesh` of all ranks, which a process group must be there for already. Ranks along `dp`,
            `dp_replicate`, `dp_shard` and `ep` have data of their own; those that differ in `cp`, `tp` and `pp` alone
            are given the same. `World.mesh`, `coordinates`, `data_rank` and `data_size` tell what came of it.

    Raises:
        LaunchError: the launcher's variables are half set, or do not fit this machine; not all ranks have come within
            `timeout` (they are named), or one ended meanwhile, or Gloo could not connect their hosts; two ranks have
            one GPU; they ask for different meshes; on leaving, the store is gone.
        TypeError, ValueError: a timeout is no number above 0; `mesh` is no mesh, a name in it is none, or the product
            of its sizes is not the number of ranks.
        StallError: on entering, not all ranks have come within `stall_timeout`.
        RemoteRankError, StallError: on leaving, if another rank failed.

    Cost: collective on entry; two threads that sleep (three if rank 0 hosts the store); one process pays nothing.
    """
    for name, value in (("timeout", timeout), ("stall_timeout", stall_timeout)):
        number(name, value, "a number of seconds above 0", above=0)
    is_alone = backend == "none"
    asked = checked_mesh(mesh, is_alone=is_alone)
    is_external = dist.is_available() and dist.is_initialized() and not is_alone
    launch = None if is_external or is_alone else find_launch(os.environ)
    control: Control | None = None
    if launch is not None:
        set_parent_death_signal(os.environ)
        opened, connections = _join(launch, backend, timeout, stall_timeout, asked)
        if launch.size > 1:
            try:
                with _explaining_lost_rank(launch):
                    control = _control(launch, opened, connections, timeout)
            except BaseException:  # else the next try would take the group for one made elsewhere
                _destroy(opened, is_failing=True)
                raise
        else:
            for each in connections:
                each.close()
    elif is_external:
        opened, control = _beside(asked, timeout)
    elif asked is not None:
        opened = _alone_on(asked, backend, timeout)
    else:
        opened = World(device=default_device(0))
    watchdog = None if control is None else _start(control, stall_timeout)
    enter(opened, NullPlane() if is_alone else control or plane())
    is_failing = True
    try:
        yield opened
        if control is not None:
            control.leave_together()
        is_failing = False
    except BaseException as error:
        raised = _report(error, control)
        if raised is error:
            raise
        if raised.__cause__ is not None:  # a signal's handler raised it while `error` was being reported
            raise raised from raised.__cause__
        raise raised from None  # `error` is only what the failure of the other rank looks like from here
    finally:
        leave()
        try:
            if control is not None and watchdog is not None:
                _close(control, watchdog, is_failing=is_failing)
        finally:
            if opened.backend != "none" and not is_external:
                _destroy(opened, is_failing)
            elif control is not None:
                dist.destroy_process_group(control.context.group)
            if is_external and opened.mesh is not None and isinstance(asked, dict):
                close_mesh(opened.mesh)


def _close(control: Control, watchdog: Watchdog, *, is_failing: bool) -> None:
    def close() -> None:
        if is_failing:
            watchdog.wait_for_stacks()
        control.close(is_failing=is_failing)
        watchdog.stop()
        control.context.connections.close(is_failing=is_failing)

    _, interruption = undisturbed(close)
    if interruption is not None:
        raise interruption


def _report(error: BaseException, control: Control | None) -> BaseException:
    """Report `error` to the other ranks; gives what to raise for it."""
    explain(error)
    if control is None:
        write_error_file(line_of(error), traceback_of(error), is_cause=True)
        return error
    frame = sys._getframe(1)
    try:
        return control.failures.failed(error, None, frame)
    except BaseException as other:  # a signal's handler raised just before: that is reported
        return control.failures.failed(other, None, frame)


def _destroy(opened: World, is_failing: bool) -> None:
    if is_failing and "nccl" in opened.backend:
        abort_group()  # destroying it would wait
    else:
        dist.destroy_process_group()


def _join(
    launch: Launch, backend: str, timeout_s: float, stall_timeout_s: float, asked: Mesh
) -> tuple[World, list[socket.socket]]:
    device = _own_device(launch)
    backend = _backend_for(device, backend)
    if (interface := chosen_interface(os.environ, launch)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # which Gloo reads for each group that is made
    store, name = rendezvous(launch, timeout_s, stall_timeout_s, mesh=as_text(asked))
    asked = fitted_mesh(asked, launch.size)
    with new_connections(launch.master_port) as connections, _explaining(launch):
        dist.init_process_group(
            backend,
            store=PrefixStore(f"dengine/group/{name}", store),
            timeout=timedelta(seconds=timeout_s),
            rank=launch.rank,
            world_size=launch.size,
            # Binding the device lets NCCL connect at once, and tells a barrier where to run.
            device_id=device if "nccl" in backend else None,
        )
    try:
        with new_connections(launch.master_port) as of_mesh:
            mesh = make_mesh(asked, device, timeout_s, connections)
    except BaseException:
        for each in connections:
            each.close()
        dist.destroy_process_group()
        raise
    opened = World(
        rank=launch.rank,
        size=launch.size,
        local_rank=launch.local_rank,
        local_size=launch.local_size,
        node_rank=launch.node_rank,
        device=device,
        backend=backend,
        launcher=launch.launcher,
        mesh=mesh,
    )
    return opened, connections + of_mesh


def _alone_on(asked: Mesh, backend: str, timeout_s: float) -> World:
    """A world of one with a mesh, for which there must be a group."""
    asked, device = fitted_mesh(asked, 1), default_device(0)
    backend = _backend_for(device, backend)
    make_group_of_one(backend)
    return World(device=device, backend=backend, mesh=make_mesh(asked, device, timeout_s))


def _backend_for(device: torch.device, backend: str) -> str:
    if backend != "auto":
        return backend
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"


def _control(launch: Launch, here: World, connections: list[socket.socket], timeout_s: float) -> Control:
    # A name of its own for each group: an agent's store outlives it, and keeps what an earlier one has said.
    holder: list[Any] = [uuid.uuid4().hex, identity()]
    dist.broadcast_object_list(holder, src=0)
    name, host_process = holder
    is_hosted = not is_agents_store(os.environ)
    endpoint = StoreEndpoint(launch.master_addr, launch.master_port, f"dengine/{name}", is_hosted)
    with new_connections(launch.master_port) as gloo_connections:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return Control(
        ControlContext(
            here, endpoint, endpoint.connect(), Connections([*connections, *gloo_connections]), group, host_process
        )
    )


def _beside(asked: Mesh, timeout_s: float) -> tuple[World, Control | None]:
    """This rank's world in a group that is there, and its control plane if there was none.

    Raises: LaunchError: the ranks ask for different meshes.
    """
    here = external_world()
    if plane().group is not None:  # inside another process_group()
        meshes = [""] if asked is None else all_gather_object(as_text(asked))
        is_shared = False
    else:
        is_shared, meshes = _first_exchange(here, as_text(asked))
    if refusal := other_meshes_text(meshes):
        raise LaunchError(refusal)
    mesh = world().mesh if asked is None else make_mesh(fitted_mesh(asked, here.size), here.device, timeout_s)
    here = replace(here, mesh=mesh)
    return here, _control_beside(here, timeout_s) if is_shared else None


def _first_exchange(here: World, mesh: str) -> tuple[bool, list[str]]:
    """Whether all ranks of a group that somebody else made reach the store of their launcher, and each one's mesh."""
    launch = find_launch(os.environ)
    is_launched = launch is not None and (launch.rank, launch.size) == (here.rank, here.size)
    is_part = launch is not None and here.size < launch.size
    if is_part:
        assert launch is not None
        warnings.warn(
            f"This process group has {here.size} of the {launch.size} ranks that {_launcher_of(launch)} started: stops "
            "and failures are not shared beyond it, and metrics and checkpoints are those of its own ranks. Where that "
            "is not meant, call process_group() before torch.distributed.init_process_group(), or make that group of "
            "all ranks.",
            stacklevel=5,
        )
    if here.size == 1:
        return False, [mesh]
    told = _gathered((is_launched or (is_part and is_agents_store(os.environ)), mesh))
    return all(reaches for reaches, _ in told), [each for _, each in told]


def _control_beside(here: World, timeout_s: float) -> Control | None:
    """The control plane for a group that somebody else made, whose ranks reach the store of their launcher."""
    launch = find_launch(os.environ)
    assert launch is not None
    connections = existing_connections(_gathered, launch.master_port)
    control = None
    with suppress(DistError):  # the store of the launcher is not reached
        control = _control(launch, here, connections, timeout_s)
    return control if all(_gathered(control is not None)) else None


def _launcher_of(launch: Launch) -> str:
    return "srun" if launch.launcher == "slurm" else launch.launcher


def _gathered(value: T) -> list[T]:
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _start(control: Control, stall_timeout_s: float) -> Watchdog:
    watchdog = Watchdog(control, stall_timeout_s)
    control.start()
    watchdog.start()
    # Where the block is never left (a notebook), the threads must be gone before the interpreter is.
    atexit.register(_leave_at_exit, weakref.ref(control), weakref.ref(watchdog))
    return watchdog


def _leave_at_exit(control: "weakref.ref[Control]", watchdog: "weakref.ref[Watchdog]") -> None:
    here, watched = control(), watchdog()
    if here is not None and watched is not None and not here.status.is_closed:
        here.close(is_failing=True)
        watched.stop()


@contextmanager
def _explaining(launch: Launch) -> Iterator[None]:
    with _explaining_lost_rank(launch), _explaining_shared_gpu(launch):
        yield


@contextmanager
def _explaining_lost_rank(launch: Launch) -> Iterator[None]:
    """A connection that breaks on entering, when nobody can be asked yet who is gone."""
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistStoreError) or is_of_backend(error)
        if isinstance(error, LaunchError | dist.DistBackendError) or not is_lost:  # NCCL says what it is
            raise
        raise LaunchError(
            f"Rank {launch.rank} of {launch.size} lost another rank while process_group() connected them: its process "
            "ended (killed, or by an error that it printed), or its host is not reached. What broke here: "
            f"{line_of(error)}"
        ) from error


@contextmanager
def _explaining_shared_gpu(launch: Launch) -> Iterator[None]:
    try:
        yield
    except dist.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise LaunchError(
            f"Rank {launch.rank} and another rank of its host have one GPU, and NCCL gives each rank one of its own "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}; {torch.cuda.device_count()} "
            f"shown, for {launch.local_size} ranks): start one process per GPU (torchrun --nproc-per-node=gpu; srun "
            "--gpus-per-task=1). process_group(backend='gloo') lets ranks share a GPU, slowly."
        ) from error


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
