"""Collect small batches and count them together: for a few numbers, most of the time is the start of an operation."""

from typing import Any, TypeAlias

import torch

__all__ = ["BatchQueue"]

_NUM_BATCHES = 32
_MAX_BYTES = 64 * 1024  # of one batch: from there on a copy costs about as much as it saves

_Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class BatchQueue:
    """Keeps copies of up to 32 `(prediction, target)` pairs of one kind, and gives them as one pair.

    It copies, as the next step may overwrite the tensors of this one. The copies stay on the device: two small copies
    for each batch, and up to 4 MiB.
    """

    def __init__(self) -> None:
        self._kind: tuple[Any, ...] | None = None  # of the pairs it takes: shapes, dtypes, devices
        self._batches: _Pair | None = None
        self._rows: list[_Pair] = []
        self._num_waiting = 0

    @property
    def is_full(self) -> bool:
        return self._num_waiting == _NUM_BATCHES

    def expect(self, output: Any) -> None:
        """Take pairs of the kind of `output`, which was checked, from now on; none if they are large."""
        self.clear()
        self._batches, self._rows = None, []
        kind = _kind(output)
        self._kind = kind if kind is not None and _is_small(*output) else None

    def add(self, output: Any) -> bool:
        """Copy the pair; False if it is of another kind. No wait for the device."""
        if self._kind is None or _kind(output) != self._kind:
            return False
        prediction, target = output
        if not self._rows:  # not before the second of a kind: the last batch of an epoch is often the only one of its
            self._allocate(prediction, target)
        prediction_row, target_row = self._rows[self._num_waiting]
        prediction_row.copy_(prediction.detach() if prediction.requires_grad else prediction)
        target_row.copy_(target.detach() if target.requires_grad else target)
        self._num_waiting += 1
        return True

    def take(self) -> _Pair | None:
        """All pairs concatenated to one; None if there are none. Valid until the next `add`."""
        if not self._num_waiting:
            return None
        assert self._batches is not None
        predictions, targets = (part[: self._num_waiting].flatten(0, 1) for part in self._batches)
        self._num_waiting = 0
        return predictions, targets

    def clear(self) -> None:
        self._num_waiting = 0

    def _allocate(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._batches = (
                prediction.new_empty((_NUM_BATCHES, *prediction.shape)),
                target.new_empty((_NUM_BATCHES, *target.shape)),
            )
        self._rows = list(zip(*(part.unbind(0) for part in self._batches), strict=True))


def _kind(output: Any) -> tuple[Any, ...] | None:
    if type(output) is not tuple or len(output) != 2:
        return None
    prediction, target = output
    if type(prediction) is not torch.Tensor or type(target) is not torch.Tensor:
        return None
    return prediction.shape, target.shape, prediction.dtype, target.dtype, prediction.device, target.device


def _is_small(prediction: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the pair is quick to copy, and has a first dimension along which batches can be concatenated."""
    if not (prediction.ndim and target.ndim and 0 < prediction.shape[0] == target.shape[0]):
        return False
    if prediction.device != target.device or not prediction.layout == target.layout == torch.strided:
        return False
    return bool(max(prediction.nbytes, target.nbytes) <= _MAX_BYTES)
