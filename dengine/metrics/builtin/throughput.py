"""The number of samples per second of all ranks together."""

from numbers import Integral
from time import perf_counter

import torch

from dengine.errors import NotComputableError
from dengine.metrics.core.batch_size import cannot_count, samples_in
from dengine.metrics.core.inputs import is_python_number, what_it_got
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.types import summable

__all__ = ["Throughput"]


class Throughput(Metric):
    """Samples per second of all ranks together: the number of all samples, divided by the longest time of a rank.

    The time runs from `reset()` (the start of the epoch) until the value is computed, which waits for the rank's GPU,
    so that queued work counts. The metric is live: handlers see this rank's speed so far in `engine.state.metrics` at
    any event; that does not wait.

    Shapes: the samples of one step are the first dimension of the target of a (prediction, target) pair, 1 if it is
        a number; the first dimension of a tensor; or a whole number, also as a 0-d tensor, which is the count itself:
        `Throughput(output_transform=lambda output: output["num_tokens"])`. On a mesh each sample counts once, however
        many ranks have it or, along `cp`, a piece of it; whole numbers are summed along `cp`, where each rank has its
        own tokens.
    Cost: no wait for the device before the epoch's end; two numbers a rank.

    Raises:
        TypeError: `update` got something else (the message lists the keys of a mapping). NotComputableError: no sample
            was seen.

    Example:
        >>> metric = Throughput()
        >>> metric.update((torch.zeros(32, 10), torch.zeros(32)))
        >>> metric.compute() > 0
        True
    """

    shows_live = True
    num_samples: torch.Tensor | int  # also those that were given as a number
    num_given: torch.Tensor | int
    elapsed_s: torch.Tensor | float

    def __init__(self, output_transform: OutputTransform | None = None) -> None:
        super().__init__(output_transform)
        self.add_state("num_samples", 0, reduce="samples")
        self.add_state("num_given", 0)
        self.add_state("elapsed_s", 0.0, reduce="gather")
        self._clock = _Clock()

    def reset(self) -> None:
        super().reset()
        self._clock = _Clock()

    def update(self, output: object) -> None:
        given = _number_given(output)
        if given is not None:
            self.num_given = self.num_given + given
        self.num_samples = self.num_samples + (_num_samples(output) if given is None else given)

    def flush(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        # Added to the time from a checkpoint: an epoch that was interrupted took both.
        self.elapsed_s = self.elapsed_s + self._clock.lap_s()

    def live_value(self) -> float:
        """The present value. It does not wait for the device: queued work counts as done."""
        elapsed_s = float(self.elapsed_s) + self._clock.read_s()
        return int(self.num_samples) / max(elapsed_s, 1e-9)

    def compute(self) -> float:
        num_samples = int(self.num_given) or int(self.num_samples)
        if not num_samples:
            raise NotComputableError("no sample was seen on any rank")
        if not isinstance(self.elapsed_s, torch.Tensor):  # not reduced by an engine
            self.flush()
        return num_samples / float(torch.as_tensor(self.elapsed_s).max().clamp(min=1e-9))


class _Clock:
    """The clock. It is an object so that a checkpoint does not save its times, which mean nothing in another
    process.
    """

    def __init__(self) -> None:
        self._started_s = perf_counter()

    def read_s(self) -> float:
        """The seconds since the last call of `lap_s`."""
        return perf_counter() - self._started_s

    def lap_s(self) -> float:
        """The seconds since the last call of this function."""
        started_s, self._started_s = self._started_s, perf_counter()
        return self._started_s - started_s


def _number_given(output: object) -> torch.Tensor | int | None:
    """`output` if it is a whole number, which then is the count; else None."""
    if isinstance(output, torch.Tensor):
        is_one = not (output.ndim or output.is_floating_point() or output.is_complex())
        return summable(output) if is_one else None
    return int(output) if isinstance(output, Integral) and not isinstance(output, bool) else None


def _num_samples(output: object) -> int:
    is_scalar = is_python_number(output) or getattr(output, "ndim", None) == 0
    samples = None if is_scalar else samples_in(output)
    if samples is not None:
        return samples
    way_out = "output_transform=, a function of the step's output that gives it"
    raise cannot_count("Throughput", what_it_got(output), way_out)
