"""What goes into a checkpoint: the states of the objects a user lists, and one entry of dengine's own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dengine.distributed import unwrap_model, world
from dengine.types import Stateful

__all__ = ["FORMAT_VERSION", "RESERVED", "check_objects", "collect"]

RESERVED = "dengine"
FORMAT_VERSION = 1


def check_objects(objects: Mapping[str, Any]) -> dict[str, Stateful]:
    """`objects` as they can be saved.

    Raises:
        TypeError: no mapping, a name that is no string, or something without `state_dict` and `load_state_dict`.
        ValueError: nothing to save, or the reserved name.
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


def collect(objects: Mapping[str, Stateful]) -> dict[str, Any]:
    """The states by name, as `torch.load(weights_only=True)` reads them.

    A model comes without its DDP or `torch.compile` wrapper, sharded tensors (FSDP2) come whole. Collective only where
    something is sharded: one gather a tensor.
    """
    states = {name: _whole(_bare(value).state_dict()) for name, value in objects.items()}
    return {**states, RESERVED: {"format": FORMAT_VERSION, "world_size": world().size}}


def _whole(state: Any) -> Any:
    """`state` with its sharded tensors put together: saved as they are, each file would hold one rank's part."""
    if isinstance(state, dict):
        return type(state)((key, _whole(value)) for key, value in state.items())
    if isinstance(state, list):
        return [_whole(value) for value in state]
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def _bare(value: Stateful) -> Stateful:
    return unwrap_model(value) if isinstance(value, nn.Module) else value
