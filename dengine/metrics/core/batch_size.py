"""Find the number of samples in a batch or in a step's output, or raise an error that asks for it."""

from typing import Any

import torch

from dengine import trees
from dengine.metrics.core.inputs import is_python_number
from dengine.metrics.core.transform import prediction_and_target

__all__ = ["cannot_count", "num_samples", "samples_in", "samples_or_one"]


def num_samples(target: object, prediction: object = None) -> int | None:
    """The number of samples of a batch: the first dimension of its target, or of the parts of that; None if unknown.

    A list or tuple of tensors may hold several targets for all samples, or one target for each: the prediction decides.
    A number is one sample. Without a target, the prediction is used.
    """
    if isinstance(target, torch.Tensor) and target.ndim:  # nearly always
        return target.shape[0]
    if is_python_number(target) or getattr(target, "ndim", None) == 0:
        return 1
    sizes, lengths = _sizes(target)
    if not sizes and not lengths:
        return None if prediction is None else num_samples(prediction)
    of_prediction = set().union(*_sizes(prediction))
    if len(sizes) == 1 and (sizes & of_prediction or not lengths & of_prediction):
        return sizes.pop()
    possible = (sizes | lengths) & of_prediction
    return possible.pop() if len(possible) == 1 else None


def samples_in(output: object) -> int | None:
    """The number of samples of a step's output or of a batch: that of the target in a pair, or in a mapping with both.

    If there are more parts, the last one is used, if it is a tensor or an array.
    """
    output = prediction_and_target(output)
    if isinstance(output, (tuple, list)):
        if len(output) == 2:
            return num_samples(output[1], output[0])
        last = output[-1] if output else None
        if getattr(last, "ndim", 0):
            return num_samples(last)
    return num_samples(output)


def samples_or_one(output: object) -> int:
    """`samples_in`, or 1 if that is unknown."""
    samples = samples_in(output)
    return 1 if samples is None else samples


def cannot_count(who: str, got: str, way_out: str) -> TypeError:
    """The error if `got` does not show the number of samples; `way_out` is the argument that gives it."""
    return TypeError(f"{who} cannot tell the number of samples from {got}: pass {way_out}.")


def _sizes(value: object) -> tuple[set[int], set[int]]:
    """Candidates for the number of samples: the first dimensions inside `value`, and lengths of lists of tensors."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return {int(size) for size in shape[:1]}, set()
    inside = trees.parts(value)
    if inside is None:
        return set(), set()
    parts = [part for _, part in inside]
    if trees.has_names(value):
        return _joined_sizes(parts)
    with_rows = [part for part in parts if isinstance(getattr(part, "shape", None), tuple) and part.shape]
    if not with_rows:
        return {len(parts)}, set()
    sizes, _ = _joined_sizes(with_rows)
    return sizes, {len(parts)}


def _joined_sizes(parts: list[Any]) -> tuple[set[int], set[int]]:
    pairs = [_sizes(part) for part in parts]
    return set().union(*(sizes for sizes, _ in pairs)), set().union(*(lengths for _, lengths in pairs))
