"""Which names in the states of objects are a part that this rank has of a model: a stage of a pipeline, its experts."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dengine.comm.parts import parts_of_names, parts_of_optimizer
from dengine.compiled_names import without_compiled
from dengine.distributed import unwrap_model, world
from dengine.types import Stateful

__all__ = ["parts_in_states", "refuse_other_parts"]

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


def refuse_other_parts(into: Mapping[str, Stateful], states: Mapping[str, object], *, is_file: bool) -> None:
    """Refuse to load `states`, as they are in a file or as a folder gives them, into parts of a model that they lack.

    No collective. Cost: nothing without a mesh; otherwise as `parts_in_states`.

    Raises:
        ValueError: the message names the model, the part, a tensor, and the way out.
    """
    for name, value in into.items() if world().mesh is not None else ():
        if not isinstance(value, nn.Module) or not isinstance(saved := states.get(name), Mapping):
            continue
        own = {without_compiled(each): None for each in unwrap_model(value).state_dict()}
        part = next(filter(None, _parts_of(unwrap_model(value), own).values()), None)
        known = {without_compiled(str(each)) for each in saved}
        missing = [each for each in own if each not in known]
        if part is None or (not missing and (not is_file or known <= own.keys())):
            continue
        if is_file:
            raise ValueError(
                f"it is a file with the whole of {name!r}, of which this rank has a part ({part}). A folder can be "
                "loaded into parts: make one in one process, by load(file, {...}) into the whole objects and "
                "save(folder, {...}), or of a model alone by `python -m dengine import FILE -o FOLDER`; "
                "load(..., partial=True) takes this part of the model from the file, and no optimizer."
            )
        raise ValueError(
            f"{f'{name}/{missing[0]}'!r} of this rank's part ({part}) is not in it"
            f"{f', nor are {len(missing) - 1} more names of it' if missing[1:] else ''}: it was saved of other parts "
            "(stages, experts). Build the same layers by the same names, and if several parts have different tensors "
            "by one name, as many parts as there were; load(..., partial=True) loads what is there."
        )


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
