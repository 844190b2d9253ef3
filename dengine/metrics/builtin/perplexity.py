"""The perplexity of a language model."""

from collections.abc import Mapping
from math import exp

import torch
from torch.nn.functional import cross_entropy

from dengine.metrics.builtin.average import WeightedMean, accumulable, sum_and_count
from dengine.metrics.core.inputs import as_pair, as_tensor, checked_ignore_index, is_kept, shape_error
from dengine.metrics.core.metric import OutputTransform
from dengine.metrics.core.transform import loss_value, prediction_and_target
from dengine.types import is_short_float

__all__ = ["Perplexity"]


class Perplexity(WeightedMean):
    """The exponential of the mean loss per token, over the tokens of all ranks.

    Shapes: `(logits, labels)`: labels `(N, ...)` of a whole-number dtype, logits `(N, C, ...)` as `cross_entropy` takes
        them or, if only that fits, `(N, ..., C)` as Hugging Face's models give them (shift their labels by one before).
        Or the input of `Average`: `(mean loss, number of tokens)`, or a mean loss alone, which counts as one. A mapping
        gives its `"loss"`, else its logits and labels. Losses are in nats.
    Cost: of logits that of `cross_entropy`; no wait for the device; three numbers.

    Args:
        ignore_index: labels that are left out. As in `cross_entropy` it is -100 by default.

    Raises:
        TypeError: `update` got something else (the message lists the keys of a mapping). ValueError: the shapes do not
        fit or, in `compute`, a label is outside the classes, on any rank. NotComputableError: no token was seen.

    Example:
        >>> metric = Perplexity()
        >>> metric.update((0.0, 1))
        >>> metric.update((torch.tensor(4.0).log(), torch.tensor(1)))
        >>> round(metric.compute(), 6)
        2.0
        >>> metric = Perplexity()
        >>> metric.update((torch.zeros(2, 3, 8), torch.tensor([[1, 2, 3], [4, -100, -100]])))  # 8 tokens, all alike
        >>> round(metric.compute(), 6)
        8.0
    """

    num_outside: torch.Tensor | int

    def __init__(self, output_transform: OutputTransform | None = None, *, ignore_index: int | None = -100) -> None:
        super().__init__(output_transform)
        self._ignore_index = checked_ignore_index(ignore_index)
        self.add_state("num_outside", 0)

    def default_transform(self, output: object) -> object:
        value = loss_value(output)
        if value is not output:
            return value
        pair = prediction_and_target(output)
        return pair if _is_logits_and_labels(pair) else output

    def update(self, output: object) -> None:
        if isinstance(output, Mapping):
            output = self.default_transform(output)
        if _is_logits_and_labels(output):
            with torch.no_grad():
                self._add_tokens(*as_pair(output, "Perplexity"))
        else:
            self.add(*sum_and_count(output, "Perplexity"))

    def compute(self) -> float:
        if num_outside := int(self.num_outside):
            raise ValueError(
                f"Perplexity got {num_outside} labels outside the classes of the logits: correct the labels, or pass "
                f"ignore_index= if they are to be left out (it is {self._ignore_index})."
            )
        mean = self.mean()
        try:
            return exp(mean)
        except OverflowError:  # above a loss of 709
            return float("inf")

    def _add_tokens(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        logits_NCX = _classes_second(logits, labels)
        labels_NX = labels.long()
        is_inside_NX = (labels_NX >= 0) & (labels_NX < logits_NCX.shape[1])
        if self._ignore_index is not None:
            kept_NX = is_kept(labels, self._ignore_index)
            is_outside_NX, is_inside_NX = kept_NX & ~is_inside_NX, kept_NX & is_inside_NX
        else:
            is_outside_NX = ~is_inside_NX
        # On a GPU a label outside the classes would end the process.
        safe_NX = torch.where(is_inside_NX, labels_NX, -100)
        scores_NCX = logits_NCX.float() if is_short_float(logits_NCX) else logits_NCX
        losses_NX = cross_entropy(scores_NCX, safe_NX, reduction="none", ignore_index=-100)
        self.add(accumulable(losses_NX).sum(), is_inside_NX.sum())
        self.num_outside = self.num_outside + is_outside_NX.sum()


def _is_logits_and_labels(output: object) -> bool:
    """Whether it is a pair of logits and labels, not `(value, count)`: labels are whole numbers, with one dimension
    less.
    """
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        return False
    logits, labels = output
    num_dimensions = getattr(labels, "ndim", 0)
    if not num_dimensions or getattr(logits, "ndim", 0) != num_dimensions + 1:
        return False
    labels = as_tensor(labels, "Perplexity")
    return not (labels.is_floating_point() or labels.is_complex())


def _classes_second(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits with the classes in the second dimension, as `cross_entropy` takes them.

    Raises:
        ValueError: neither the second nor the last dimension can be that of the classes.
    """
    if not logits.is_floating_point() or logits.shape[0] != labels.shape[0]:
        fits = False
    elif logits.shape[2:] == labels.shape[1:] and logits.shape[1]:
        return logits
    else:
        fits = bool(logits.shape[:-1] == labels.shape and logits.shape[-1])
    if not fits:
        raise shape_error("Perplexity", logits, labels, "(N, C, ...) or (N, ..., C) logits with (N, ...) labels")
    return logits.movedim(-1, 1)
