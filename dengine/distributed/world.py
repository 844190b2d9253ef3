"""Who this process is among the others. A lone process is a world of one, and runs the same code."""

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

__all__ = ["World", "control", "default_device", "enter", "external_world", "leave", "world"]


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` over all nodes, `local_rank` of `local_size` on node `node_rank`.

    `device` is where this rank computes; `launcher` is "torchrun", "slurm", "external" (a process group that was
    there already) or "single".
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"
    launcher: str = "single"


# The one global of the package: the worlds that `process_group()` opened, and how their ranks leave together.
_entered: list[tuple[World, object]] = []


def world() -> World:
    """This process's `World`, from anywhere. Never communicates.

    Inside `process_group()` it is that one's; with a process group of the user's own, it is read from that;
    else it is a world of one.
    """
    if _entered:
        return _entered[-1][0]
    if dist.is_available() and dist.is_initialized():
        return external_world()
    return World(device=default_device(0))


def external_world() -> World:
    """The world of a process group that somebody else has initialised."""
    size = dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(
        rank=dist.get_rank(),
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        node_rank=dist.get_rank() // local_size,
        device=default_device(local_rank),
        backend=dist.get_backend_config(),
        launcher="external",
    )


def default_device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU where there is none.

    A scheduler that gives each task one GPU of its own shows it as device 0 to every task.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank)


def control() -> object:
    """The `Control` of the world that was opened; None in a world of one, or of a group that somebody else made."""
    return _entered[-1][1] if _entered else None


def enter(opened: World, control: object) -> None:
    _entered.append((opened, control))


def leave() -> None:
    _entered.pop()
