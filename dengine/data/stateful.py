"""Recognise data that keep their own position, and say how exact the state is that they give."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, TypeGuard

from torch import nn
from torch.utils.data import Dataset, IterableDataset

from dengine.types import Stateful, is_stateful

__all__ = ["counts_globally", "forget_position", "going_on", "inexactness", "keeps_position", "version_of"]

_MOST_STAGES = 64  # of a pipeline of Hugging Face's


def keeps_position(data: object) -> TypeGuard[Stateful]:
    """Whether `data` can be iterated over and save their own position: `state_dict()` and `load_state_dict(state)`."""
    if isinstance(data, type | nn.Module) or not is_stateful(data) or not hasattr(data, "__iter__"):
        return False
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return False  # samples by index: its state is no position
    return _takes(data.state_dict, 0) and _takes(data.load_state_dict, 1)


def counts_globally(dataset: object) -> bool:
    """Whether it is MosaicML's `StreamingDataset`, whose state is the number of samples of all ranks."""
    names = [(each.__module__.partition(".")[0], each.__name__) for each in type(dataset).__mro__]
    return ("streaming", "StreamingDataset") in names and is_stateful(dataset)


def inexactness(data: object) -> str | None:
    """Why the state of `data`, or of the data set in them, is not quite the position; None if it is."""
    own = (data, getattr(data, "dataset", None))
    for part in (*own, *(getattr(each, "_dataset", None) for each in own)):  # as prepare_data_loader() wraps one
        if getattr(part, "state_is_exact", True) is False:
            return f"{type(part).__qualname__}.state_is_exact is False"
        for stage in _stages(getattr(part, "_ex_iterable", None)):  # Hugging Face's
            if type(stage).__name__ == "BufferShuffledExamplesIterable":
                return "a shuffle buffer is not saved with the state, but filled anew"
            if getattr(stage, "batched", False) and getattr(getattr(stage, "formatting", None), "is_table", False):
                return "a batched map() over tables may leave out a batch"
    return None


def going_on(data: Any, *, may_be_over: bool) -> Iterator[Any]:
    """An iterator over `data` that have loaded a position, from there on: an empty one if that is the end of a pass.

    If the pass `may_be_over`, it may be one over the next pass as well.
    """
    if may_be_over or getattr(data, "restart_on_stop_iteration", None) is not True:
        return iter(data)
    data.restart_on_stop_iteration = False  # of a Loader of torchdata.nodes, which would begin the next pass
    try:
        return iter(data)
    finally:
        data.restart_on_stop_iteration = True


def forget_position(data: object) -> None:
    """Let a stream of Hugging Face's forget the state that it has gone on from: it would do so in every later pass of
    the same epoch.
    """
    for part in (data, getattr(data, "dataset", None)):
        stream: Any = getattr(part, "_dataset", part)
        if getattr(stream, "_starting_state_dict", None) is not None:
            stream._starting_state_dict = None


def version_of(value: object) -> str:
    """The version of the package that has the class of `value`; "" if it is not known."""
    package = type(value).__module__.partition(".")[0]
    found = getattr(sys.modules.get(package), "__version__", None)
    if isinstance(found, str):
        return found
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def _takes(method: Callable[..., object], num_arguments: int) -> bool:
    try:
        inspect.signature(method).bind(*[None] * num_arguments)
    except TypeError:
        return False
    except ValueError:  # written in C
        return True
    return True


def _stages(last: Any) -> Iterator[Any]:
    """The stages of a pipeline of Hugging Face's, of which `last` is the last."""
    level: Iterable[Any] = [last]
    for _ in range(_MOST_STAGES):
        level = [each for each in level if each is not None]
        if not level:
            return
        yield from level
        level = [
            stage
            for each in level
            for stage in (getattr(each, "ex_iterable", None), *(getattr(each, "ex_iterables", None) or ()))
        ]
