"""Losses that stand out from the last ones, by robust statistics, without a wait for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dengine.types import accumulator_dtype

__all__ = ["Spikes"]

_NUM_LOSSES = 128  # the window
_FIRST = 50  # before that many good steps nothing stands out
_NORMAL = 1.4826  # a standard deviation of normal values is this many median absolute deviations
_LEAST = 1e-3  # of the median: losses that hardly differ are no reason to call the next one a spike


class Spikes:
    """The last good losses of this rank, and which loss is above `limit` robust deviations of their median.

    Cost: a loss takes about ten small operations on its device.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        self._window: Tensor | None = None
        self._num_losses = self._num_steps = 0
        self._new: list[Tensor] = []  # of the step under way

    def stands_out(self, loss: Tensor) -> Tensor:
        """Whether `loss` (a plain tensor of one number) is a spike, as a tensor on its device. Notes the loss."""
        loss = loss.reshape(()).to(accumulator_dtype(loss.device))
        self._new.append(loss)
        if self._num_steps < _FIRST or self._window is None:
            return torch.zeros((), dtype=torch.bool, device=loss.device)
        known = self._window[: min(self._num_losses, _NUM_LOSSES)]
        median = known.median()
        deviation = (known - median).abs().median() * _NORMAL
        return loss > median + self._limit * torch.maximum(deviation, median.abs() * _LEAST)

    def keep(self) -> None:
        """Add the losses of a good step to the window."""
        for loss in self._new:
            if self._window is None or self._window.device != loss.device:
                before, self._window = self._window, torch.zeros(_NUM_LOSSES, dtype=loss.dtype, device=loss.device)
                if before is not None:  # loaded, from a checkpoint
                    self._window.copy_(before)
            self._window[self._num_losses % _NUM_LOSSES] = loss
            self._num_losses += 1
        self._num_steps += bool(self._new)
        self._new = []

    def drop(self) -> None:
        """Forget the losses of a step that was left out."""
        self._new = []

    def remember(self) -> Callable[[], None]:
        """A function that sets the losses of the step under way back to those of now."""
        new = self._new.copy()

        def set_back() -> None:
            self._new = new

        return set_back

    def copied(self) -> dict[str, Any]:
        """The state, on its device: no wait."""
        window = None if self._window is None else self._window.clone()
        return {"window": window, "num_losses": self._num_losses, "num_steps": self._num_steps}

    def state_dict(self) -> dict[str, Any]:
        state = self.copied()
        return state if state["window"] is None else {**state, "window": state["window"].cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        window = state["window"]
        self._window = None if window is None else window.clone()
        self._num_losses, self._num_steps = state["num_losses"], state["num_steps"]
        self._new = []
