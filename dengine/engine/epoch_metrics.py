"""Compute the metrics at the end of an epoch, restore them in a resumed one, end them in one that is cut short."""

import warnings

from dengine.engine.state import State
from dengine.errors import NotComputableError
from dengine.launch.world import world
from dengine.metrics.collection.live import MetricValues
from dengine.metrics.collection.metric_set import MetricSet
from dengine.random_state import RandomState
from dengine.types import MetricValue

__all__ = ["compute", "end_live", "restore"]


def compute(metrics: MetricSet, *, distributed: bool, is_whole: bool) -> dict[str, MetricValue]:
    """The metrics of the epoch; none if it was resumed (not `is_whole`) at its very end. Collective."""
    try:
        return metrics.compute(distributed=distributed)
    except NotComputableError:
        if is_whole:
            raise
        return {}


def end_live(state: State, *, is_read: bool) -> None:
    """Fix the live values of an epoch that was cut short at what they are now."""
    if isinstance(state.metrics, MetricValues):
        state.metrics.freeze(is_read=is_read)


def restore(metrics: MetricSet, saved: RandomState, epoch: int) -> None:
    """Restore the states that the metrics had in `epoch`, or warn if they cannot go on from them."""
    is_whole = saved["world_size"] == world().size and metrics.load_state_dict(saved["metrics"])
    if not is_whole and world().rank == 0:
        warnings.warn(
            f"The metrics of epoch {epoch} are of what is left of it: the run was started with other "
            "metrics or another number of ranks.",
            RuntimeWarning,
            stacklevel=2,
        )
