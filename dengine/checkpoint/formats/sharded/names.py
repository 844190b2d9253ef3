"""Convert an optimizer's state to the names of its parameters, so that it fits a model with another sharding.

An optimizer numbers its parameters in the order in which it got them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dengine.checkpoint.formats.sharded.tree import Names
from dengine.compiled_names import without_compiled
from dengine.distributed import unwrap_model

__all__ = ["LikeParameters", "model_of", "named_optimizer_state", "numbered_optimizer_state"]


@dataclass(frozen=True)
class LikeParameters:
    """The layout of an optimizer's state before the optimizer has one: a tensor with a parameter's shape is laid out
    like it.

    Make it by `LikeParameters.of(model)`.
    """

    parameters: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "LikeParameters":
        return cls({without_compiled(name): parameter for name, parameter in model.named_parameters()})


def named_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    state: Mapping[str, Any] | None = None,
    *,
    has_parts: bool = False,
) -> dict[str, Any]:
    """The state of `optimizer` (`state`, or its `state_dict()`) with names of `model`'s parameters instead of numbers.

    With `has_parts`, other ranks have other parameters. No collective. The tensors are the optimizer's own, sharded if
    the parameters are.

    Raises:
        ValueError: the optimizer has a parameter that is not one of the model's.
    """
    state = optimizer.state_dict() if state is None else state
    names = _names(optimizer, model)
    kind = Names if has_parts else list
    return {
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": kind(names[number] for number in group["params"])} for group in state["param_groups"]
        ],
    }


def numbered_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]
) -> dict[str, Any]:
    """A state with names, converted for `optimizer.load_state_dict`. The tensors are the same objects.

    Parameters are matched by name: their order within a group may differ. If ranks had different parts, each group
    takes the options that all of its parameters had.

    Raises:
        ValueError: the groups do not hold the parameters they held.
    """
    names = _names(optimizer, model)
    numbers = {name: number for number, name in names.items()}
    groups = optimizer.state_dict()["param_groups"]
    saved_groups = state["param_groups"]
    if any(isinstance(saved["params"], Names) for saved in saved_groups):
        own_names = [[names[number] for number in group["params"]] for group in groups]
        saved_groups = _regrouped(saved_groups, own_names)
    if len(groups) != len(saved_groups):
        raise ValueError(f"The optimizer has {len(groups)} parameter groups, but {len(saved_groups)} were saved.")
    loaded = []
    for place, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        own = [names[number] for number in group["params"]]
        if different := sorted(set(own) ^ set(map(without_compiled, saved["params"]))):
            holder = "the optimizer's" if different[0] in own else "the saved one's"
            raise ValueError(f"Parameter group {place} differs: {different[0]!r} is in {holder} only.")
        loaded.append({**saved, "params": list(group["params"])})
    by_number = {numbers[without_compiled(name)]: value for name, value in state["state"].items()}
    return {"state": by_number, "param_groups": loaded}


def _regrouped(saved: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The saved options for each of `groups`.

    Raises:
        ValueError: parameters of one group had different ones.
    """
    place_of = {without_compiled(name): place for place, group in enumerate(saved) for name in group["params"]}
    known = {name for group in groups for name in group}
    if strange := next((name for name in place_of if name not in known), None):
        raise ValueError(f"{strange!r} is in the saved optimizer only.")
    made = []
    for place, group in enumerate(groups):
        options: list[dict[str, Any]] = []
        for each in dict.fromkeys(place_of[name] for name in group if name in place_of):
            options.append({key: value for key, value in saved[each].items() if key != "params"})
            if options[-1] != options[0]:
                key = next(key for key, value in options[-1].items() if options[0].get(key) != value)
                raise ValueError(
                    f"Parameter group {place} was saved as several with different options: {key!r} is "
                    f"{options[0].get(key)!r} and {options[-1][key]!r}. Make as many groups as there were."
                )
        made.append({**(options[0] if options else {}), "params": [name for name in group if name in place_of]})
    return made


def model_of(name: str, optimizer: torch.optim.Optimizer, objects: Mapping[str, object]) -> nn.Module:
    """The model among `objects` to which the parameters of `optimizer` belong; `name` is for the error.

    Raises:
        ValueError: none of them has all of the optimizer's parameters.
    """
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    models = {key: value for key, value in objects.items() if isinstance(value, nn.Module)}
    for model in models.values():
        if wanted <= {id(parameter) for parameter in unwrap_model(model).parameters()}:
            return model
    listed = f"none of {', '.join(map(repr, models))} has" if models else "no model beside it has"
    raise ValueError(
        f"{name!r} is kept by the names of its parameters, as it belongs to a sharded checkpoint, but {listed} all of "
        "them: list the model that the optimizer was built from too, and build it from the prepared model."
    )


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    """The number of each parameter in `optimizer.state_dict()`, and its name in the model."""
    name_of = {id(parameter): without_compiled(name) for name, parameter in unwrap_model(model).named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        if id(parameter) not in name_of:
            raise ValueError(
                f"Parameter {number} of this {type(optimizer).__qualname__}, of shape {tuple(parameter.shape)}, is "
                "none of the model's: build the optimizer from the prepared model's parameters."
            )
    return {number: name_of[id(parameter)] for number, parameter in enumerate(parameters)}
