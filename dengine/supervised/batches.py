"""The parts and the weight of a batch: check the user's functions, or use the defaults."""

from collections.abc import Callable, Mapping, Sized
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dengine import trees
from dengine.checks import is_number, takes
from dengine.metrics.core import batch_size
from dengine.metrics.core.class_loss import class_loss, count_of, num_probabilities, option
from dengine.naming import a_type, describe
from dengine.parallel.gradients import Count

__all__ = [
    "ClassWeight",
    "LossFunction",
    "ModelFunction",
    "OutputFunction",
    "PrepareBatch",
    "WeightFunction",
    "check_callables",
    "check_calls",
    "checked_pair",
    "checked_weight",
    "counts_samples",
    "default_weight",
    "detached",
    "num_samples",
    "pair_on_device",
]

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
PrepareBatch: TypeAlias = Callable[[Any, torch.device], tuple[Any, Any]]
ModelFunction: TypeAlias = Callable[[nn.Module, Any], Any]
WeightFunction: TypeAlias = Callable[[Any, Any], Count]
OutputFunction: TypeAlias = Callable[..., Any]

_WHO = "A supervised trainer"


def pair_on_device(batch: object, device: torch.device) -> tuple[object, object]:
    """`(inputs, targets)` of a batch that is a pair, on `device`.

    Raises: TypeError: it is no pair; the message says what to pass.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{type(batch).__qualname__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__qualname__
        raise TypeError(
            f"A batch must be an (inputs, targets) pair, but is a {what}: pass prepare_batch=, a function (batch, "
            "device) -> (inputs, targets)."
        )
    return on_device(batch[0], device), on_device(batch[1], device)


def on_device(value: object, device: torch.device) -> Any:
    """`value` with the tensors in nested containers moved to `device`, from pinned memory without a wait."""
    if isinstance(value, Tensor):
        return _leaf_on_device(value, device)
    return trees.map_leaves(lambda leaf: _leaf_on_device(leaf, device), value, is_leaf=_moves_itself)


def _leaf_on_device(leaf: object, device: torch.device) -> object:
    if isinstance(leaf, Tensor):
        return leaf if leaf.device == device else leaf.to(device, non_blocking=True)
    to = getattr(leaf, "to", None)
    return to(device) if callable(to) else leaf


def _moves_itself(container: object) -> bool:
    """Whether a tuple or a dataclass has its own `to()`: a PackedSequence leaves its sizes on the host."""
    return callable(getattr(container, "to", None)) and not isinstance(container, Mapping)


def detached(value: object) -> Any:
    """`value` without its graph, so that a step's output keeps no activations."""
    return _detached_leaf(value) if isinstance(value, Tensor) else trees.map_leaves(_detached_leaf, value)


def _detached_leaf(leaf: object) -> object:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def num_samples(inputs: object, targets: object) -> int:
    """The number of samples: the first dimension of the targets, or of their parts, else of the inputs.

    Raises: TypeError: there is none, or the tensors of a list differ in it (one tensor a sample); the message says what
        to pass.
    """
    if isinstance(targets, (tuple, list)):
        _refuse_one_a_sample(inputs, targets)
    samples = batch_size.num_samples(targets, inputs)
    if samples is None:
        got = f"inputs of {type(inputs).__qualname__} and targets of {type(targets).__qualname__}"
        raise batch_size.cannot_count(_WHO, got, "weight=, a function (inputs, targets) -> number")
    return samples


def default_weight(loss_fn: LossFunction) -> WeightFunction:
    """The default weight of a batch: the divisor of `loss_fn`, if that is known, else the number of samples."""
    source = class_loss(loss_fn)
    return num_samples if source is None or option(source, "reduction") != "mean" else ClassWeight(source)


class ClassWeight:
    """The weight of a batch for a loss over classes: the number of labels that count, or the sum of their class
    weights.

    With one label a sample, no class weights and torch's default `ignore_index` of -100, this is the number of samples,
    so that ranks can agree on it for many batches at once.
    """

    def __init__(self, source: object) -> None:
        self._source = source
        self.is_plain = option(source, "weight") is None and option(source, "ignore_index") == -100

    def __call__(self, inputs: object, targets: object) -> Count:
        if not isinstance(targets, Tensor) or (self.is_plain and targets.ndim == 1):
            return num_samples(inputs, targets)
        return num_probabilities(targets) if targets.is_floating_point() else count_of(self._source, targets)

    def counts_samples(self, targets: object) -> bool:
        """Whether batches with `targets` like these count their samples, whatever their values."""
        return self.is_plain and not (isinstance(targets, Tensor) and targets.ndim > 1)


def counts_samples(weight: WeightFunction, targets: object) -> bool:
    """Whether a batch with these targets counts its samples, as far as is known without reading values."""
    return weight is num_samples or (isinstance(weight, ClassWeight) and weight.counts_samples(targets))


def _refuse_one_a_sample(inputs: object, targets: list[Any] | tuple[Any, ...]) -> None:
    """Refuse a list with one tensor a sample: several inputs of a batch have their first dimension in common."""
    if not targets or not isinstance(targets[0], Tensor):
        return
    parts = [*targets, *(inputs if isinstance(inputs, (tuple, list)) else [inputs])]
    sizes = {part.shape[0] for part in parts if isinstance(part, Tensor) and part.ndim}
    if len(sizes) > 1:
        way_out = "weight=, for lists with one tensor a sample weight=lambda inputs, targets: len(targets)"
        raise batch_size.cannot_count(_WHO, f"tensors whose first dimensions are {sorted(sizes)}", way_out)


def checked_pair(prepare_batch: PrepareBatch) -> PrepareBatch:
    """`prepare_batch` with a check that its result is a pair. A tensor of two rows, or a dict, would be unpacked as
    one.

    Raises: (when called) TypeError: the result is something else.
    """

    def prepare(batch: object, device: torch.device) -> tuple[object, object]:
        pair = prepare_batch(batch, device)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"prepare_batch gave {_what(pair)}, but must give the pair (inputs, targets).")
        return pair[0], pair[1]

    return prepare


def checked_weight(weight: WeightFunction) -> WeightFunction:
    """`weight` with a check that its result is one number. Nothing is read from a device.

    Raises: (when called) TypeError: the result is something else.
    """

    def weigh(inputs: object, targets: object) -> Count:
        count = weight(inputs, targets)
        if isinstance(count, Tensor):
            if count.ndim == 0 and not count.is_complex():
                return count
        elif is_number(count):
            return count
        raise TypeError(
            f"weight gave {_what(count)}, but must give what the batch counts, a number or a 0-d tensor: "
            "weight=lambda inputs, targets: (targets != -100).sum()."
        )

    return weigh


def _what(value: object) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{a_type(value)} of shape {tuple(value.shape)}"
    return f"{a_type(value)}{f' of {len(value)}' if isinstance(value, Sized) else ''}"


def check_callables(**functions: object) -> None:
    """Refuse arguments that are neither None nor callable, or are a class of modules. Raises: TypeError."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r} must be a function.")
        if isinstance(function, type) and issubclass(function, nn.Module):
            raise TypeError(
                f"{name} is the class {function.__qualname__}: pass an instance, {function.__qualname__}()."
            )


def check_calls(functions: Mapping[str, tuple[Callable[..., object] | None, str]]) -> None:
    """Check functions by name, each with its arguments.

    Raises: TypeError: as in `check_callables`, or one cannot be called with these arguments.
    """
    check_callables(**{name: function for name, (function, _) in functions.items()})
    for name, (function, arguments) in functions.items():
        if function is not None and not takes(function, len(arguments.split(", "))):
            raise TypeError(f"{name}={describe(function)} cannot be called as {name}({arguments}).")
