"""How fast the samples went by, on all ranks together."""

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
    """Samples per second of all ranks together: all their samples, over the longest time that a rank took.

    The time runs from `reset()` (the epoch's beginning) until the value is computed, when the rank's GPU is waited for,
    so that work still queued there counts. It is live: a handler of any event sees this rank's speed so far in
    `engine.state.metrics`, for which nothing is waited for.

    Shapes: the samples of one step are the first dimension of the target of a (prediction, target) pair, 1 if it is
        a number; the first dimension of a tensor; or a whole number, also as a 0-d tensor, which is the count itself:
        `Throughput(output_transform=lambda output: output["num_tokens"])`. On a mesh each sample counts once, whatever
        ranks have it or, along `cp`, a piece of it; whole numbers are summed along `cp`, each rank having own tokens.
    Cost: no wait for the device before the epoch's end; two numbers a rank.

    Raises:
        TypeError: `update` got something else; it lists a mapping's keys. NotComputableError: no sample was seen.

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
        # On top of what a checkpoint has brought: an epoch that is resumed in its middle took both times.
        self.elapsed_s = self.elapsed_s + self._clock.lap_s()

    def live_value(self) -> float:
        """As it is now. The device is not waited for: work that is queued there counts as done."""
        elapsed_s = float(self.elapsed_s) + self._clock.read_s()
        return int(self.num_samples) / max(elapsed_s, 1e-9)

    def compute(self) -> float:
        num_samples = int(self.num_given) or int(self.num_samples)
        if not num_samples:
            raise NotComputableError("no sample was seen on any rank")
        if not isinstance(self.elapsed_s, torch.Tensor):  # by hand
            self.flush()
        return num_samples / float(torch.as_tensor(self.elapsed_s).max().clamp(min=1e-9))


class _Clock:
    """An object of its own: what it reads means nothing in another process, to which a checkpoint takes numbers."""

    def __init__(self) -> None:
        self._started_s = perf_counter()

    def read_s(self) -> float:
        """The time since `lap_s` was called last."""
        return perf_counter() - self._started_s

    def lap_s(self) -> float:
        """The time since this was called last."""
        started_s, self._started_s = self._started_s, perf_counter()
        return self._started_s - started_s


def _number_given(output: object) -> torch.Tensor | int | None:
    """`output` if it is a whole number, which is the count itself, else None."""
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
