"""Restore a model if spreading it over ranks fails halfway."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dengine import torch_internals

__all__ = ["Before", "unchanged_by_errors"]


class Before:
    """The attributes and the class of each module of a model. Cost: no memory for tensors, as long as they live
    anyway.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), _contents(module)) for module in model.modules()]

    def forget(self) -> None:
        """Drop the tensors. After this, an error leaves the model as it is at that moment."""
        self._modules = []

    def restore(self) -> None:
        for module, kind, contents in self._modules:
            if type(module) is not kind:
                torch_internals.forget_fsdp(module)
                module.__class__ = kind
            vars(module).clear()
            for name, (value, inside) in contents.items():
                if inside is not None:  # in place: a handle of a hook refers to the same dict
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(inside)
                vars(module)[name] = value


@contextmanager
def unchanged_by_errors(model: nn.Module) -> Iterator[Before]:
    """Restore `model` if the `with` block raises, unless `forget` was called."""
    before = Before(model)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, with a copy of its content if it is a container."""
    return {
        name: (value, value.copy() if isinstance(value, dict | set | list) else None)
        for name, value in vars(module).items()
    }
