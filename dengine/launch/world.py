"""This process among the others. A lone process is a world of one, and runs the same code."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dengine.errors import LaunchError, RankZeroCollectiveError
from dengine.launch.env import Launch, find_launch, shared_start
from dengine.launch.mesh import DATA_NAMES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from dengine.control.plane import Plane

__all__ = [
    "World",
    "default_device",
    "enter",
    "entered_plane",
    "external_world",
    "leave",
    "needs_all_ranks",
    "rank_zero_scope",
    "refuse_forgotten_group",
    "refuse_on_rank_zero_alone",
    "world",
    "world_for",
    "world_of",
]


@dataclass(frozen=True)
class World:
    """This process among the others: `rank` of `size` over all nodes, `local_rank` of `local_size` on node `node_rank`.

    `device` is where this rank computes; `launcher` is "torchrun", "slurm", "external" (a process group that was
    there already) or "single".

    `mesh` is that of `process_group(mesh=)`. Without a mesh, every rank gets data of its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"
    launcher: str = "single"
    mesh: DeviceMesh | None = None

    @cached_property
    def mesh_sizes(self) -> dict[str, int]:
        """The number of ranks along each dimension of the mesh; {} without a mesh."""
        if self.mesh is None:
            return {}
        return dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True))

    @cached_property
    def coordinates(self) -> dict[str, int]:
        """The index of this rank along each dimension of the mesh; {} without a mesh."""
        position = None if self.mesh is None else self.mesh.get_coordinate()
        return {} if position is None else dict(zip(self.mesh_sizes, position, strict=True))

    @cached_property
    def data_rank(self) -> int:
        """The number of the part of the data, of `data_size`, that this rank gets."""
        if self.mesh is None:
            return self.rank
        rank = 0
        for name, size in self.mesh_sizes.items():
            rank = rank * size + self.coordinates[name] if name in DATA_NAMES else rank
        return rank

    @cached_property
    def data_size(self) -> int:
        """The number of parts into which the data are split. Ranks that differ only in `cp`, `tp` and `pp` share
        one.
        """
        if self.mesh is None:
            return self.size
        return prod(size for name, size in self.mesh_sizes.items() if name in DATA_NAMES)

    @cached_property
    def same_data_ranks(self) -> tuple[int, ...]:
        """The ranks that get the same data as this one, this one included."""
        if self.mesh is None:
            return (self.rank,)
        index = tuple(own if name in DATA_NAMES else slice(None) for name, own in self.coordinates.items())
        return tuple(sorted(self.mesh.mesh[index].flatten().tolist()))

    def place_of(self, rank: int) -> str:
        """The coordinates of `rank` as text, "dp=0, tp=1"; "" without a mesh."""
        if self.mesh is None:
            return ""
        position = (self.mesh.mesh == rank).nonzero()[0].tolist()
        return ", ".join(f"{name}={index}" for name, index in zip(self.mesh_sizes, position, strict=True))

    @cached_property
    def has_last_stage(self) -> bool:
        """Whether this rank has the last stage of a pipeline (`pp`), which gives the output. True without one."""
        return self.coordinates.get("pp", 0) == self.mesh_sizes.get("pp", 1) - 1

    @cached_property
    def may_lack_output(self) -> bool:
        """Whether a step may give None here, as others have its output: without the last stage, or a part of `cp`."""
        return not self.mesh_sizes.keys().isdisjoint(("pp", "cp"))

    @cached_property
    def counts_samples(self) -> bool:
        """Whether the samples of this rank count. Of ranks with the same tokens only one counts them.

        Of ranks that differ in `tp` that is the first, in `pp` the last; along `cp` all count, each its own tokens.
        """
        return self.rank in self.all_counting_ranks

    @cached_property
    def counting_ranks(self) -> tuple[tuple[int, ...], ...]:
        """The ranks for which `counts_samples` is true, in a group for each part of the data (those along `cp` share
        one).
        """
        if self.mesh is None:
            return tuple((rank,) for rank in range(self.size))
        index = {"tp": 0, "pp": -1}
        ranks = self.mesh.mesh[tuple(index.get(name, slice(None)) for name in self.mesh_sizes)]
        names = [name for name in self.mesh_sizes if name not in index]
        if "cp" in names:
            ranks = ranks.movedim(names.index("cp"), -1)
        return tuple(map(tuple, ranks.reshape(-1, self.mesh_sizes.get("cp", 1)).tolist()))

    @cached_property
    def all_counting_ranks(self) -> tuple[int, ...]:
        """The ranks for which `counts_samples` is true, in order."""
        return tuple(sorted(rank for ranks in self.counting_ranks for rank in ranks))


# The worlds that `process_group()` opened, the innermost last, each with its control plane.
_entered: list[tuple[World, Plane]] = []
_left: list[World] = []  # worlds that had a group: what a script does after them, it does alone on purpose


def world() -> World:
    """This process's `World`, from anywhere. Never communicates.

    Inside `process_group()` it is that group's; else it is read from a process group of the user's own, if there is
    one; else it is a world of one.
    """
    if _entered:
        return _entered[-1][0]
    if dist.is_available() and dist.is_initialized():
        return external_world()
    return World(device=default_device(0))


class _RankZeroScope(threading.local):
    """The names of the rank-0-only functions that this thread is in."""

    def __init__(self) -> None:
        self.names: list[str] = []


rank_zero_scope = _RankZeroScope()


def world_for(collective: str) -> World:
    """The world whose ranks all come to `collective`. Never communicates.

    Raises: RankZeroCollectiveError: inside a function that only rank 0 runs.
    """
    refuse_on_rank_zero_alone(collective)
    return world()


def refuse_on_rank_zero_alone(collective: str) -> None:
    """Raise `RankZeroCollectiveError` inside a function that only rank 0 runs."""
    if rank_zero_scope.names:
        raise RankZeroCollectiveError(
            f"{collective} is a collective, but {rank_zero_scope.names[-1]} runs on rank 0 only, so the other ranks "
            "would never join it. Call it from a handler that runs on every rank; an evaluation that is rank 0's own "
            "takes Engine(..., distributed=False)."
        )


def needs_all_ranks(refusal: str) -> None:
    """Refuse what this rank is to do by itself, and cannot if there are others.

    Raises: ValueError: there are.
    """
    if world().size > 1:
        raise ValueError(refusal)


def external_world() -> World:
    """The world of a process group that other code has initialised."""
    rank, size = dist.get_rank(), dist.get_world_size()
    launch = None
    with suppress(LaunchError):
        launch = find_launch(os.environ)
    if launch is None or (launch.rank, launch.size) != (rank, size):  # it was not made from the launcher's variables
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        launch = Launch("external", rank, size, local_rank, local_size, rank // local_size, "", 0)
    return replace(
        world_of(launch, default_device(launch.device_index), dist.get_backend_config()), launcher="external"
    )


def world_of(launch: Launch, device: torch.device, backend: str, mesh: DeviceMesh | None = None) -> World:
    """The world of a process that was started as `launch` says."""
    return World(
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


def default_device(index: int) -> torch.device:
    """The GPU number `index`, or the only GPU that is visible, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else index)


def entered_plane() -> Plane | None:
    """The control plane of the innermost open `process_group()`; None outside of one."""
    return _entered[-1][1] if _entered else None


def enter(opened: World, plane: Plane) -> None:
    _entered.append((opened, plane))


def leave() -> None:
    opened, _ = _entered.pop()
    if opened.backend != "none" and not _left:
        _left.append(opened)


def refuse_forgotten_group(call: str) -> None:
    """Refuse `call` if a launcher started several processes but this one has opened no process group.

    Never communicates. Raises: LaunchError: as said above.
    """
    if _entered or _left or (dist.is_available() and dist.is_initialized()):
        return
    if (started := shared_start(os.environ)) is not None:
        raise LaunchError(
            f"{started}, but {call} is called outside of a process group, so that each process would act by itself. "
            "Put the script into `with distributed.process_group():`. If every process is to work alone, open "
            '`process_group("none")`, which makes each a world of one; a single engine is made so by '
            "Engine(..., distributed=False)."
        )
