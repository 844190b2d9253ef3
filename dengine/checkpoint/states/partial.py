"""Load the part of a checkpoint that fits an object that has changed since then: equal names and shapes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from dengine.checkpoint.formats.sharded.tree import all_tensors
from dengine.checkpoint.states.per_rank import PerRank
from dengine.types import Stateful

__all__ = ["Fitting", "LeftOut"]


class LeftOut(NamedTuple):
    """The names that `load(..., partial=True)` has left out, such as `model/head.weight`, or the name of a whole
    object.

    A name whose shapes differ is in both lists.

    Attributes:
        missing_keys: names in the objects; these are as they were.
        unexpected_keys: names in the checkpoint, which were not used.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Fitting:
    """Picks the parts of saved states that fit, and notes the others."""

    def __init__(self) -> None:
        self.left_out = LeftOut([], [])

    def of(self, name: str, target: Stateful, saved: Any, own: Any) -> Any:
        """`own` with the parts of `saved` that fit; None if the whole object is left out.

        The state of an optimizer, or of a rank alone, is used completely or not at all, as its parts belong
        together.
        """
        if isinstance(target, torch.optim.Optimizer | PerRank):
            if target.misfit(saved) is None if isinstance(target, PerRank) else _fits(target, saved):
                return saved
            self.leave(name)
            return None
        return self._merged(saved, own, name, is_by_name=isinstance(target, nn.Module))

    def leave(self, name: str) -> None:
        self.left_out.missing_keys.append(name)
        self.left_out.unexpected_keys.append(name)

    def _merged(self, saved: Any, own: Any, path: str, *, is_by_name: bool = False) -> Any:
        if isinstance(own, torch.Tensor):
            if isinstance(saved, torch.Tensor) and saved.shape == own.shape:
                return saved
        elif not is_by_name and not all_tensors(own):
            return saved
        elif isinstance(own, dict) and isinstance(saved, Mapping):
            return self._merged_dict(saved, own, path)
        elif isinstance(own, list | tuple) and isinstance(saved, list | tuple) and len(own) == len(saved):
            parts = zip(saved, own, strict=True)
            return type(own)([self._merged(*part, f"{path}/{place}") for place, part in enumerate(parts)])
        self.leave(path)
        return own

    def _merged_dict(self, saved: Mapping[Any, Any], own: dict[Any, Any], path: str) -> Any:
        merged: Any = type(own)()
        for key, value in own.items():
            where = f"{path}/{key}"
            if key in saved:
                merged[key] = self._merged(saved[key], value, where)
            else:
                self.left_out.missing_keys.append(where)
                merged[key] = value
        self.left_out.unexpected_keys.extend(f"{path}/{key}" for key in saved if key not in own)
        versions = getattr(saved, "_metadata", None) or getattr(own, "_metadata", None)
        if versions is not None:
            merged._metadata = versions
        return merged


def _fits(optimizer: torch.optim.Optimizer, saved: Any) -> bool:
    """Whether the saved groups have the same numbers of parameters, and the saved tensors the shapes of these.

    A tensor that can be broadcast to the shape, as Adafactor's rows and columns, fits, too.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    numbers = [group["params"] for group in saved["param_groups"]]
    if list(map(len, groups)) != list(map(len, numbers)):
        return False
    for group, its_numbers in zip(groups, numbers, strict=True):
        for parameter, number in zip(group, its_numbers, strict=True):
            for kept in all_tensors(saved["state"].get(number, {})):
                sizes = zip(kept.shape, parameter.shape, strict=False)
                if kept.ndim == parameter.ndim and any(one not in (1, size) for one, size in sizes):
                    return False
    return True
