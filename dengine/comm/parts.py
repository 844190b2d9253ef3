"""Find the tensors in parts of a model that ranks have on purpose: stages of a pipeline, and experts.

`prepare_model(module, parts="ep")` marks the module, and its copies are marked as well. This is the only place that
reads the mark. A tensor is in a part along each dimension of the mesh with which a module around it is marked, except
those over which it is a DTensor, which itself knows this rank's piece. `world().coordinates` says which part along a
dimension this rank has. Ranks that differ only in other dimensions have the same part.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dengine.control.plane import plane
from dengine.dtensor import mesh_of
from dengine.launch.world import world

__all__ = [
    "Dimensions",
    "mark_part",
    "named_modules_beside_parts",
    "named_parameters_beside_parts",
    "parts_inside",
    "parts_of_names",
    "parts_of_optimizer",
    "parts_of_parameters",
]

Dimensions: TypeAlias = tuple[str, ...]  # of the mesh, in its order: ("pp",), ("ep",), ("pp", "ep")

_MARK = "_dengine_part"


def mark_part(module: nn.Module, dimension: str) -> None:
    """Note that ranks along `dimension` of the mesh have different parts of a model on purpose; `module` is this
    rank's.
    """
    setattr(module, _MARK, dimension)
    mesh = world().mesh
    assert mesh is not None  # of which it is a dimension
    plane().prepared.add_part(module, mesh[dimension])


def parts_of_names(model: nn.Module, names: Iterable[str]) -> dict[str, Dimensions]:
    """For each of `names` in `model.state_dict()`, the dimensions along which its tensor is a part; others are left
    out.

    No collective. The answer is that of this rank: others may have other names.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> parts_of_names(model, model.state_dict())  # nothing of it was prepared with parts=
        {}
    """
    marked = {path: module for path, module in model.named_modules() if _is_part(module)}
    if not marked:
        return {}
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    found = {}
    for name in names:
        around = [getattr(module, _MARK) for path, module in marked.items() if _is_within(name, path)]
        if dimensions := _in_order(around, tensors.get(name)):
            found[name] = dimensions
    return found


def parts_of_optimizer(optimizer: torch.optim.Optimizer) -> dict[int, Dimensions]:
    """The same as `parts_of_names` for the parameters of `optimizer`, by their numbers in its state."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    by_id = parts_of_parameters()
    return {number: by_id[id(each)] for number, each in enumerate(parameters) if id(each) in by_id}


def parts_of_parameters() -> dict[int, Dimensions]:
    """The same as `parts_of_names` for the parameters of all prepared parts that are still alive, by the `id` of
    each. A part without a parameter is in it by its own `id`: other ranks may have parameters there.
    """
    around: dict[int, tuple[nn.Parameter, tuple[str, ...]]] = {}
    found: dict[int, Dimensions] = {}
    for module, _ in plane().prepared.living_parts():
        mark = (getattr(module, _MARK),)
        if next(module.parameters(), None) is None:
            found[id(module)] = mark
        for parameter in module.parameters():
            known = around.get(id(parameter))
            around[id(parameter)] = parameter, mark if known is None else known[1] + mark
    kinds: dict[tuple[Any, ...], Dimensions] = {}  # as there are many parameters of few kinds, in each step
    for key, (parameter, marks) in around.items():
        kind = marks, id(mesh_of(parameter))
        if kind not in kinds:
            kinds[kind] = _in_order(marks, parameter)
        if dimensions := kinds[kind]:
            found[key] = dimensions
    return found


def parts_inside(model: nn.Module) -> list[nn.Module]:
    """The modules inside `model` that were prepared as parts before it: the experts of its layers."""
    return [module for module in model.modules() if module is not model and _is_part(module)]


def named_modules_beside_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` that are in no part inside it, by name; `model` itself may be one."""
    inside = {each for part in parts_inside(model) for each in part.modules()}
    return ((path, module) for path, module in model.named_modules() if module not in inside)


def named_parameters_beside_parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The items of `model.named_parameters()`, except those of parts inside it."""
    inside = {id(each) for part in parts_inside(model) for each in part.parameters()}
    return ((name, each) for name, each in model.named_parameters() if id(each) not in inside)


def _is_within(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _is_part(module: nn.Module) -> bool:
    """Whether `module` was prepared as a part, or is a copy of one that was."""
    return hasattr(module, _MARK)


def _in_order(marks: Iterable[str], tensor: Tensor | None) -> Dimensions:
    """The `marks` that are dimensions of several ranks, and not of a mesh over which `tensor` is spread."""
    mesh, own = world().mesh, mesh_of(tensor)
    if mesh is None:
        return ()
    left = set(marks).difference((own.mesh_dim_names or ()) if own is not None else ())
    names = mesh.mesh_dim_names or ()
    return tuple(name for name, size in zip(names, mesh.shape, strict=True) if size > 1 and name in left)
