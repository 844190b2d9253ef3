"""Steps a learning-rate schedule."""

from typing import Any

from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dengine.engine import Engine

__all__ = ["LRScheduler"]


class LRScheduler:
    """Steps `scheduler` whenever it is called; `ReduceLROnPlateau` with the metric it waits for.

    Attach it on every rank, where the schedule is to be stepped: `trainer.on(Events.EPOCH_COMPLETED, schedule)`.
    It is no collective: a metric's value is the same on all ranks.

    Args:
        scheduler: any of torch's. Warm-up is a composition of torch's own (`SequentialLR`, `LinearLR`).
        metric_name: of `state.metrics`; what `ReduceLROnPlateau` is stepped with, and nothing else takes.
        metric_engine: whose metrics; by default the engine it is attached to.

    Raises:
        TypeError: `scheduler` is none. ValueError: a plateau without `metric_name`, or another schedule with one.
        KeyError: (when called) there is no such metric; it lists those there are.

    Example:
        >>> import torch
        >>> from dengine import Engine, Events
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> trainer = Engine(lambda engine, batch: optimizer.step())
        >>> schedule = LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1))
        >>> handle = trainer.on(Events.EPOCH_COMPLETED, schedule)
        >>> state = trainer.run([0], max_epochs=2)
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    def __init__(
        self, scheduler: TorchScheduler, metric_name: str | None = None, metric_engine: Engine | None = None
    ) -> None:
        if not isinstance(scheduler, TorchScheduler):
            raise TypeError(f"LRScheduler() takes a scheduler of torch.optim.lr_scheduler, but got {scheduler!r}.")
        is_plateau = isinstance(scheduler, ReduceLROnPlateau)
        if is_plateau and metric_name is None:
            raise ValueError("ReduceLROnPlateau waits for a metric: pass metric_name=, a name in state.metrics.")
        if not is_plateau and (metric_name is not None or metric_engine is not None):
            raise ValueError(
                f"{type(scheduler).__qualname__} takes no metric: leave out metric_name and metric_engine."
            )
        self._scheduler = scheduler
        self._metric_name = metric_name
        self._metric_engine = metric_engine

    def __call__(self, engine: Engine) -> None:
        if self._metric_name is None:
            self._scheduler.step()
            return
        metrics = (self._metric_engine or engine).state.metrics
        if self._metric_name not in metrics:
            raise KeyError(
                f"ReduceLROnPlateau waits for the metric {self._metric_name!r}, but the engine has "
                f"{', '.join(map(repr, metrics)) or 'none'}: add it, or pass the engine that has it as metric_engine=."
            )
        assert isinstance(self._scheduler, ReduceLROnPlateau)
        self._scheduler.step(float(metrics[self._metric_name]))

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state_dict)
