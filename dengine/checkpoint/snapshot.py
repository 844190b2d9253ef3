"""What goes into a checkpoint: the states of the objects a user lists, and one entry of dengine's own."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from dengine.distributed import all_gather_object, unwrap_model, world
from dengine.errors import CheckpointError
from dengine.types import Stateful

__all__ = ["FORMAT_VERSION", "RANDOM", "RESERVED", "HostCopy", "States", "bare", "check_objects", "collect", "mapped"]

RESERVED = "dengine"
RANDOM = "random"  # in the reserved entry: name -> one state of the generators for each rank
FORMAT_VERSION = 1

States: TypeAlias = dict[str, Any]


def check_objects(objects: Mapping[str, Any]) -> dict[str, Stateful]:
    """`objects` as they can be saved and loaded.

    Raises:
        TypeError: no mapping, a name that is no string, or something without `state_dict` and `load_state_dict`.
        ValueError: nothing in it, or the reserved name.
    """
    if not isinstance(objects, Mapping):
        raise TypeError(f"A checkpoint takes a dict such as {{'model': model}}, but got {objects!r}.")
    if not objects:
        raise ValueError("A checkpoint needs at least one object to save, e.g. {'model': model}.")
    for name, value in objects.items():
        if not isinstance(name, str):
            raise TypeError(f"The names of what is saved must be strings, but got {name!r}.")
        if name == RESERVED:
            raise ValueError(f"The name {RESERVED!r} is reserved for dengine's own entry: choose another one.")
        if not isinstance(value, Stateful):
            raise TypeError(
                f"{name!r} cannot be saved: a {type(value).__qualname__} has no state_dict() and load_state_dict()."
            )
    return dict(objects)


def collect(objects: Mapping[str, Stateful]) -> States:
    """The states by name, as `torch.load(weights_only=True)` reads them, and the random generators of every rank.

    A model comes without its DDP or `torch.compile` wrapper, sharded tensors (FSDP2) come whole. Tensors are the live
    ones, not copies. Collective: one gather of small objects, and one of each sharded tensor.

    Raises:
        CheckpointError: on every rank, where an object has no state to give on one of them.
    """
    states: States = {}
    mine: dict[str, Any] = {}
    failure, cause = None, None
    for name, value in objects.items():
        try:
            states[name] = bare(value).state_dict()
            if hasattr(value, "load_random_state"):
                mine[name] = value.random_state()  # type: ignore[attr-defined]
        except Exception as error:
            failure, cause = f"{name!r} gave no state: {type(error).__qualname__}: {error}", error
            break
    gathered = all_gather_object((failure, mine))
    for rank, (reason, _) in enumerate(gathered):
        if reason is not None:
            raise CheckpointError(f"Nothing was saved or changed, since on rank {rank} {reason}") from cause
    random = {name: [theirs[name] for _, theirs in gathered] for name in mine}
    reserved = {"format": FORMAT_VERSION, "world_size": world().size, RANDOM: random}
    return {**{name: mapped(state, _whole) for name, state in states.items()}, RESERVED: reserved}


class HostCopy:
    """Copies of states in host memory, which share nothing with what goes on being trained.

    The memory is used again by the next copy, so one copy at a time is valid. It is pinned where tensors come from a
    CUDA device. Tensors that are one and the same (tied weights) stay so.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def take(self, states: States) -> States:
        """Cost: one copy of the bytes, and one wait for each CUDA device that holds some of them."""
        copied: dict[tuple[Any, ...], torch.Tensor] = {}
        devices: set[torch.device] = set()

        def copy_of(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return copy.deepcopy(value)
            if value.layout != torch.strided:
                return value.detach().cpu().clone()
            key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in copied:
                copied[key] = self._copied(value.detach(), len(copied))
                devices.add(value.device)
            return copied[key]

        with torch.no_grad():
            taken = mapped(states, copy_of)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the copies were only queued
        del self._buffers[len(copied) :]
        return taken  # type: ignore[no-any-return]

    def _copied(self, tensor: torch.Tensor, place: int) -> torch.Tensor:
        if place == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[place]
        is_cuda = tensor.device.type == "cuda"
        fits = buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and buffer.stride() == tensor.stride()
        if not fits or (is_cuda and not buffer.is_pinned()):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=is_cuda)
            self._buffers[place] = buffer
        return buffer.copy_(tensor, non_blocking=is_cuda)


def bare(value: Stateful) -> Stateful:
    """A model without its wrappers; anything else as it is."""
    return unwrap_model(value) if isinstance(value, nn.Module) else value


def _whole(value: Any) -> Any:
    """A sharded tensor put together: saved as it is, each file would hold one rank's part."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`value` with `leaf` applied to what is inside its dicts, lists and tuples, all of which are new ones."""
    if isinstance(value, dict):
        new = copy.copy(value)  # keeps the type, and what a module's state says of versions (`_metadata`)
        for key, part in value.items():
            new[key] = mapped(part, leaf)
        return new
    if type(value) in (list, tuple):
        return type(value)([mapped(part, leaf) for part in value])
    return leaf(value)
