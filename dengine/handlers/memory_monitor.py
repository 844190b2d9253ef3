"""Add the peak memory use to the metrics of an epoch."""

import sys

import torch

from dengine.distributed import all_reduce
from dengine.engine import Engine, Events
from dengine.engine.handler_checks import collective
from dengine.handlers.arguments import check_engine
from dengine.handlers.priorities import Priority
from dengine.naming import shown

__all__ = ["MemoryMonitor"]

_BYTES_PER_MIB = 2**20


class MemoryMonitor:
    """Adds the highest memory use so far to the metrics after each epoch.

    It is `state.metrics["peak_host_mib"]` and, if this process works on a GPU, `state.metrics["peak_device_mib"]`. The
    value is that of the rank that uses most. Host memory is the resident set of the process (without the workers of a
    data loader), device memory is what PyTorch's allocator has handed out. Both are peaks since the process began: the
    counters of other tools are not reset.

    Attach it on every rank. Collective, unless the engine is one rank's own. Cost: one all-reduce of two numbers an
    epoch; nothing in an iteration, and no wait for the device.

    Example:
        >>> from dengine import Engine
        >>> trainer = Engine(lambda engine, batch: None)
        >>> MemoryMonitor().attach(trainer)
        >>> trainer.run([0]).metrics["peak_host_mib"] > 10
        True
    """

    def __repr__(self) -> str:
        return shown(self)

    def attach(self, engine: Engine) -> None:
        """Add the values to `engine.state.metrics` at the end of each epoch, before the other handlers.

        Raises: TypeError: `engine` is not an Engine. ValueError: it has a metric of one of these names already.
        """
        check_engine(self, engine)
        for name in ("peak_host_mib", "peak_device_mib"):
            if name in engine.metric_names:
                raise ValueError(
                    f"The engine has a metric {name!r}, which is a name that MemoryMonitor uses: rename it."
                )
        engine.on(Events.EPOCH_COMPLETED, self._measure, priority=Priority.VALUES)

    @collective
    def _measure(self, engine: Engine) -> None:
        # Both on every rank, so that ranks with and without a GPU reduce the same.
        peaks = {"peak_host_mib": _host_peak_mib(), "peak_device_mib": _device_peak_mib()}
        if engine.distributed:
            peaks = all_reduce(peaks, "max")
        engine.state.metrics.update({name: peak for name, peak in peaks.items() if peak > 0})


def _host_peak_mib() -> float:
    try:
        import resource
    except ImportError:  # Windows: 0 leaves the value out
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_a_unit = 1 if sys.platform == "darwin" else 1024
    return peak * bytes_a_unit / _BYTES_PER_MIB


def _device_peak_mib() -> float:
    # To ask would start CUDA, which takes memory itself.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0.0
    return torch.cuda.max_memory_allocated() / _BYTES_PER_MIB
