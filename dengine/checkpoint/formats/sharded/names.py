"""An optimizer's state by the names of its parameters, so that it fits a model that is sharded otherwise.

An optimizer numbers its parameters; the numbers follow from the order they were given in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dengine.compiled_names import without_compiled
from dengine.distributed import unwrap_model

__all__ = ["LikeParameters", "model_of", "named_optimizer_state", "numbered_optimizer_state"]


@dataclass(frozen=True)
class LikeParameters:
    """Says how the state of an optimizer is laid out, before the optimizer has one: each tensor of a parameter's
    shape as that parameter. `LikeParameters.of(model)`."""

    parameters: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "LikeParameters":
        return cls({without_compiled(name): parameter for name, parameter in model.named_parameters()})


def named_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`optimizer.state_dict()`, or `state`, which it gave, with the names of `model`'s parameters in place of
    numbers. No collective.

    The tensors are the optimizer's own, sharded if the parameters are.

    Raises:
        ValueError: the optimizer has a parameter that is not one of the model's.
    """
    state = optimizer.state_dict() if state is None else state
    names = _names(optimizer, model)
    return {
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def numbered_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]
) -> dict[str, Any]:
    """What `named_optimizer_state` gave, as `optimizer.load_state_dict` takes it; the tensors are the same ones.

    Parameters are matched by name: their order within a group may differ.

    Raises:
        ValueError: the groups do not hold the parameters they held.
    """
    names = _names(optimizer, model)
    numbers = {name: number for number, name in names.items()}
    groups = optimizer.state_dict()["param_groups"]
    saved_groups = state["param_groups"]
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


def model_of(name: str, optimizer: torch.optim.Optimizer, objects: Mapping[str, object]) -> nn.Module:
    """The model among `objects` whose parameters `optimizer` has, by their identity; `name` is for the error.

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
