"""Names of parameters without the part that `torch.compile` adds.

`torch.compile` wraps a module, and the wrapper holds it as `_orig_mod`. A checkpoint has the names of the plain model,
so that it fits whether or not the model, or a part of it, is compiled. Older checkpoints with the longer names are
read, too.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from dengine.torch_internals import HIDDEN_BY_COMPILE

__all__ = ["HIDDEN", "aligned", "without_compiled"]

HIDDEN = f"{HIDDEN_BY_COMPILE}."


def without_compiled(name: str) -> str:
    """`layers.0._orig_mod.weight` -> `layers.0.weight`."""
    if HIDDEN not in name:
        return name
    *parts, last = name.split(".")
    return ".".join([part for part in parts if part != HIDDEN_BY_COMPILE] + [last])


def aligned(state: object, like: object) -> Any:
    """`state` with the names that `like` uses for the same things, at every depth; other names lose `_orig_mod`.

    `like` is the state of the object that will load `state`. If it is {}, all names become the plain ones. A state
    that needs no other name comes back as it is.
    """
    if not isinstance(state, dict) or not isinstance(like, Mapping):
        return state
    own = {without_compiled(name): name for name in like if isinstance(name, str) and HIDDEN in name}
    names = {name: _name(name, like, own) for name in state}
    parts = {names[name]: aligned(part, like.get(names[name])) for name, part in state.items()}
    if len(parts) != len(state) or all(parts.get(name) is part for name, part in state.items()):
        return state
    new: Any = type(state)()
    new.update(parts)
    if (more := getattr(state, "__dict__", None)) is not None:
        new.__dict__.update(more)
        if isinstance(versions := more.get("_metadata"), Mapping):
            new._metadata = _versions(versions, getattr(like, "_metadata", None))
    return new


def _name(name: Any, like: Mapping[Any, Any], own: Mapping[str, str]) -> Any:
    if not isinstance(name, str) or name in like:
        return name
    plain = without_compiled(name)
    return own.get(plain, plain)


def _versions(saved: Mapping[str, Any], own: Mapping[str, Any] | None) -> OrderedDict[str, Any]:
    """The version numbers of modules, which a state carries beside its tensors, by the names of the model."""
    plain = {_module(name): versions for name, versions in saved.items()}  # what is within a wrapper comes after it
    return OrderedDict((name, plain[_module(name)]) for name in own or plain if _module(name) in plain)


def _module(name: str) -> str:
    return without_compiled(f"{name}.").removesuffix(".")
