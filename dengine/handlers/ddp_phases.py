"""Tell a clock when the forward and the backward pass of models in DDP begin, and when DDP waits for other ranks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dengine import torch_internals, trees
from dengine.comm.waits import waiting
from dengine.handlers.phase_clock import HostStamps, PhaseClock

__all__ = ["DDPPhases"]


class DDPPhases:
    """Hooks on models in DDP, from now until `remove`. Nothing is sent, and gradients are not touched.

    A backward pass begins with the gradient of the model's output. Its own work is done with its last gradient; then
    DDP waits until the sums of all gradients are there, and for that the ranks that come later.
    """

    def __init__(self, models: Iterable[DistributedDataParallel], clock: PhaseClock) -> None:
        self._clock = clock
        self._ends = []
        for model in models:
            self._ends.append(model.register_forward_pre_hook(self._forward_begins).remove)
            self._ends.append(model.register_forward_hook(self._forward_ended).remove)
            self._ends.append(torch_internals.time_buffer_sync(model, waiting))

    def __reduce__(self) -> tuple[Any, ...]:
        return DDPPhases, (
            (),
            PhaseClock(HostStamps()),
        )  # of a model that is pickled during a run: its hooks do nothing

    def remove(self) -> None:
        for end in self._ends:
            end()
        self._ends.clear()

    def _forward_begins(self, model: object, inputs: object) -> None:
        if not torch.compiler.is_compiling() and self._clock.phase in ("step", "backward"):
            self._clock.switch("forward")

    def _forward_ended(self, model: object, inputs: object, output: object) -> None:
        if torch.compiler.is_compiling() or self._clock.phase != "forward" or not torch.is_grad_enabled():
            return
        for each in trees.leaves(output):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]

    def _backward_begins(self, gradient: Any) -> None:
        if self._clock.phase == "forward":
            self._clock.switch("backward")
            torch_internals.after_backward(self._wait_begins)

    def _wait_begins(self) -> None:
        self._clock.num_passes += 1
        self._clock.wait_begins()
        torch_internals.after_backward(self._wait_ended)

    def _wait_ended(self) -> None:
        self._clock.phase = "step"
        self._clock.wait_ended()
