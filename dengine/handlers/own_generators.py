"""Find the random number generators that a step has for itself, beside Python's, NumPy's and torch's own."""

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["OwnGenerators"]

_DEPTH = 6
_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_SHALLOW = (ModuleType, type, str, bytes, int, float, torch.Tensor)


class OwnGenerators:
    """The generators that are found from a step: in its closure, its globals, its object, and in `model`."""

    def __init__(self, step: Callable[..., object], model: nn.Module) -> None:
        self._found = dict(_search(step, "the step", _DEPTH, set()))
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, _KINDS):
                    self._found[f"{name}.{key}" if name else key] = value
        self._states = {name: _state(each) for name, each in self._found.items()}

    def drawn_from(self) -> str | None:
        """The name of one that has changed since this was made; None if there is none."""
        return next((name for name, each in self._found.items() if _state(each) != self._states[name]), None)


def _search(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _KINDS):
        yield name, value
        return
    if depth == 0 or id(value) in seen or isinstance(value, _SHALLOW) or _is_librarys(value):
        return
    seen.add(id(value))
    for key, part in _parts(value):
        yield from _search(part, key, depth - 1, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What `value` refers to, with the name that the user knows it by."""
    if isinstance(value, MethodType):
        yield from ((str(key), part) for key, part in getattr(value.__self__, "__dict__", {}).items())
        value = value.__func__
    if isinstance(value, functools.partial):
        yield "the step", value.func
        yield from value.keywords.items()
        yield from ((f"argument {index}", part) for index, part in enumerate(value.args))
    elif isinstance(value, FunctionType):
        code = value.__code__
        for key, cell in zip(code.co_freevars, value.__closure__ or (), strict=False):
            try:
                yield key, cell.cell_contents
            except ValueError:  # not set yet
                continue
        yield from ((key, value.__globals__[key]) for key in code.co_names if key in value.__globals__)
        yield from ((f"a default of {value.__name__}", part) for part in value.__defaults__ or ())
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in list(value.items())[:100])
    elif isinstance(value, list | tuple | set):
        yield from ((f"item {index}", part) for index, part in enumerate(list(value)[:100]))
    elif not isinstance(value, nn.Module):
        attributes = getattr(value, "__dict__", {})
        if isinstance(attributes, dict):
            yield from ((str(key), part) for key, part in attributes.items())


def _is_librarys(value: Any) -> bool:
    """Whether it is of a library that has no generator of the step's own."""
    module = getattr(value, "__module__", None) or getattr(type(value), "__module__", "") or ""
    return module.partition(".")[0] in (
        "torch",
        "numpy",
        "random",
        "builtins",
        "dengine",
        "accelerate",
    ) and not isinstance(value, Mapping | list | tuple | set | functools.partial)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().numpy())
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.get_state(legacy=False))
