"""Which names in the states of objects are a part that this rank has of a model: a stage of a pipeline, its experts."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dengine.comm.parts import parts_of_names, parts_of_optimizer
from dengine.compiled_names import without_compiled
from dengine.distributed import unwrap_model, world
from dengine.types import Stateful

__all__ = ["parts_in_states"]

Path = tuple[str, ...]


def parts_in_states(objects: Mapping[str, Stateful], states: Mapping[str, object]) -> dict[Path, str]:
    """The paths of names in the `states` of `objects`, each with the part that it is of ("pp=1"), or "" if it is of
    none; only those of models that have parts, of their optimizers, of schedules of these, and of averages of them.

    No collective. Cost: nothing without a mesh; otherwise some microseconds for each module.
    """
    if world().mesh is None:
        return {}
    parts: dict[Path, str] = {}
    of_parameters: dict[int, tuple[str, str]] = {}  # its name and its part, by the id of each
    for name, value in objects.items():
        if isinstance(value, nn.Module):
            model = unwrap_model(value)
            of_names = _parts_of(model, states[name])
            parts.update(((name, each), part) for each, part in of_names.items())
            for key, parameter in model.named_parameters() if of_names else ():
                each = without_compiled(key)
                of_parameters[id(parameter)] = each, of_names.get(each, "")
    for name, value in objects.items():
        if isinstance(value, torch.optim.Optimizer):
            parameters = [id(each) for group in value.param_groups for each in group["params"]]
            found = [of_parameters[each] for each in parameters if each in of_parameters]
            parts.update(((name, "state", each), part) for each, part in found)
        elif not isinstance(value, nn.Module):
            parts.update(((name, *path), part) for path, part in _parts_within(value, states.get(name)))
            parts.update(((name, key), part) for key, part in _parts_of_schedule(value, states.get(name)))
    return parts


def _parts_of_schedule(value: object, state: object) -> Iterator[tuple[str, str]]:
    """All that a schedule of an optimizer of parts has: its lists go by the groups of this rank's parameters."""
    optimizer = getattr(value, "optimizer", None)
    if not isinstance(optimizer, torch.optim.Optimizer) or not isinstance(state, Mapping):
        return
    found = {each for dimensions in parts_of_optimizer(optimizer).values() for each in dimensions}
    if text := ",".join(f"{name}={place}" for name, place in world().coordinates.items() if name in found):
        yield from ((key, text) for key in state)


def _parts_within(value: object, state: object) -> Iterator[tuple[Path, str]]:
    """Those of a model that an object has under the name under which its state has that model's: an average's."""
    for key, part in state.items() if isinstance(state, Mapping) else ():
        if isinstance(part, Mapping) and isinstance(model := getattr(value, str(key), None), nn.Module):
            yield from (((key, name), each) for name, each in _parts_of(unwrap_model(model), part).items())


def _parts_of(model: nn.Module, state: object) -> dict[str, str]:
    """The part of each name in `state`, that of `model`; {} if none is in one."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name: without_compiled(name) for name, _ in named}
    known = set(names.values())
    names |= {name: name for name in (state if isinstance(state, Mapping) else ()) if name not in known}
    if not (found := parts_of_names(model, names)):
        return {}
    here = world().coordinates
    texts = {names[name]: ",".join(f"{each}={here[each]}" for each in dimensions) for name, dimensions in found.items()}
    return {name: texts.get(name, "") for name in names.values()}
