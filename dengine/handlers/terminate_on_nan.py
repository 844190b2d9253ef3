"""End a run whose output is not finite."""

import numbers
import warnings
from typing import Any

import numpy as np
import torch

from dengine import trees
from dengine.dtensor import local_part, summed_up
from dengine.engine import Engine
from dengine.handlers.arguments import check_function, has_output
from dengine.metrics.core.metric import OutputTransform
from dengine.naming import other_names, shown

__all__ = ["TerminateOnNan"]

_READ_EVERY = 16  # iterations: reading a flag on a GPU waits for all that was queued before it


@other_names(
    attach="it takes one event, so write trainer.on(Events.ITERATION_COMPLETED, handler)",
)
class TerminateOnNan:
    """Stops the run, on all ranks at the same iteration, if the step's output holds a NaN or an infinite number.

    It checks numbers, tensors and NumPy arrays, by themselves or in dicts, lists, tuples and dataclasses, at any depth;
    values in other objects are not seen. The result of a check on a GPU stays there, and is read every 16 iterations
    and at the end of an epoch of known length, so that the run goes on for up to 15 iterations; on the CPU it is read
    at once.

    With a `Guard` on the same engine, the guard wins: a step that it left out does not end the run, and on a device,
    where it judges steps later, nothing is checked here.

    Attach it on every rank: `trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())`.

    Args:
        output_transform: gives the part of the step's output that is checked; by default all of it.

    Raises:
        TypeError: `output_transform` cannot be called with the output.

    Example:
        >>> import warnings
        >>> from dengine import Engine, Events
        >>> trainer = Engine(lambda engine, batch: {"loss": 1.0 if batch < 3 else float("nan")})
        >>> handle = trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     trainer.run(range(100)).iteration
        4
    """

    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        check_function("output_transform", output_transform, "output")
        self._transform = output_transform
        self._flags: dict[torch.device, torch.Tensor] = {}  # whether all values were finite
        self._last_iteration = 0

    def __repr__(self) -> str:
        return shown(self, output_transform=self._transform)

    def __call__(self, engine: Engine) -> None:
        repeats = engine.repeats
        if repeats.is_left_out or (repeats.guard is not None and repeats.guard.is_late):
            return  # the guard decides
        if engine.state.iteration <= self._last_iteration:  # another run: an end between two reads left its flag
            self._flags.clear()
        self._last_iteration = engine.state.iteration
        output = engine.state.output
        if self._transform is not None and has_output(engine):
            output = self._transform(output)
        is_wrong = self._note(output)
        state = engine.state
        if is_wrong or (self._is_due(state.iteration, state.epoch_iteration == state.epoch_length) and self._read()):
            self._flags.clear()
            warnings.warn(
                f"The step's output held a NaN or an infinite number by iteration {state.iteration} "
                f"(epoch {state.epoch}), so the run is ended.",
                RuntimeWarning,
                stacklevel=2,
            )
            engine.terminate()

    def _note(self, value: Any) -> bool:
        """Check `value`; True if a part of it is not finite. The results for tensors go into the flags."""
        return any(self._note_leaf(leaf) for leaf in trees.leaves(value))

    def _note_leaf(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            # This rank's part is enough: a rank that ends the run ends it on all.
            self._note_tensor(local_part(summed_up(value.detach())))
            return False
        if isinstance(value, np.ndarray):
            return value.dtype.kind in "fc" and not bool(np.isfinite(value).all())
        if isinstance(value, numbers.Rational):  # of any size, also one that no float can hold
            return False
        return isinstance(value, numbers.Number) and not bool(np.isfinite(complex(value)))  # type: ignore[call-overload]

    def _note_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:
            tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
        if tensor.is_floating_point() and tensor.element_size() == 1:  # float8 knows no isfinite
            tensor = tensor.float()
        if tensor.is_floating_point() or tensor.is_complex():
            is_finite = torch.isfinite(tensor).all()
            flag = self._flags.get(tensor.device)
            self._flags[tensor.device] = is_finite if flag is None else flag.logical_and_(is_finite)

    def _is_due(self, iteration: int, is_last: bool) -> bool:
        is_free = all(device.type == "cpu" for device in self._flags)
        return is_free or is_last or iteration % _READ_EVERY == 0

    def _read(self) -> bool:
        return any(not flag.item() for flag in self._flags.values())
