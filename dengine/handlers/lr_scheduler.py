"""Step a learning-rate scheduler."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dengine.engine import Engine
from dengine.engine.repeats import follows_left_out_step
from dengine.naming import a_type, other_keywords, other_names, shown

__all__ = ["LRScheduler"]


@other_names(
    attach="it takes one event, so write trainer.on(Events.EPOCH_COMPLETED, handler), or at ITERATION_COMPLETED",
)
class LRScheduler:
    """Steps `scheduler` whenever it is called, `ReduceLROnPlateau` with the value of a metric.

    Attach it on every rank, to the event of a step: `trainer.on(Events.EPOCH_COMPLETED, schedule)`. It is not a
    collective: a metric has the same value on all ranks, so all make the same step. An iteration whose step a `Guard`
    left out is no step of the schedule.

    Args:
        scheduler: any scheduler of torch, or one whose `step(epoch)` takes the number of the step, as timm's do: the
            first call is step 1. A scheduler of timm that counts updates (`t_in_epochs=False`) is stepped by
            `step_update`: attach it to iterations, or to optimizer steps.
        metric_name: the name in `state.metrics` of the value that `ReduceLROnPlateau` (timm's `PlateauLRScheduler`)
            takes; only for these.
        metric_engine: the engine with that metric; by default the engine it is attached to.

    Raises:
        TypeError: `scheduler` is not a scheduler. ValueError: `ReduceLROnPlateau` without `metric_name`, or another
            scheduler with one.
        KeyError, TypeError: (when called) the metric does not exist (the message lists those that do), is not computed
            yet, or is not a number.

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

        Warm-up is a composition of torch's own, here three iterations before a cosine, stepped after each iteration:

        >>> optimizer.param_groups[0]["lr"] = 1.0
        >>> warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        >>> both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[3])
        >>> rates = []
        >>> trainer = Engine(lambda engine, batch: optimizer.step() or rates.append(optimizer.param_groups[0]["lr"]))
        >>> handle = trainer.on(Events.ITERATION_COMPLETED, LRScheduler(both))
        >>> state = trainer.run(range(7))
        >>> [round(rate, 2) for rate in rates]
        [0.25, 0.5, 0.75, 1.0, 0.85, 0.5, 0.15]
    """

    @other_keywords(
        lr_scheduler="it is called scheduler=",
    )
    def __init__(self, scheduler: object, metric_name: str | None = None, metric_engine: Engine | None = None) -> None:
        if not isinstance(scheduler, TorchScheduler) and not _takes_step_number(scheduler):
            raise TypeError(
                f"LRScheduler() takes a scheduler of torch.optim.lr_scheduler or of timm, but got {scheduler!r}."
            )
        kind = type(scheduler).__qualname__
        is_plateau = isinstance(scheduler, ReduceLROnPlateau) or kind == "PlateauLRScheduler"
        if is_plateau and metric_name is None:
            raise ValueError(f"{kind} waits for a metric: pass metric_name=, a name in state.metrics.")
        if not is_plateau and (metric_name is not None or metric_engine is not None):
            raise ValueError(
                f"{type(scheduler).__qualname__} takes no metric: leave out metric_name and metric_engine."
            )
        if metric_name is not None and not isinstance(metric_name, str):
            raise TypeError(f"metric_name={metric_name!r} must be a name in state.metrics.")
        if metric_engine is not None and not isinstance(metric_engine, Engine):
            raise TypeError(f"metric_engine={metric_engine!r} must be the Engine whose metric is meant.")
        self._scheduler: Any = scheduler if isinstance(scheduler, TorchScheduler) else _Counted(scheduler)
        self._kind = kind
        self._metric_name = metric_name
        self._metric_engine = metric_engine

    def __repr__(self) -> str:
        return shown(self, self._scheduler, metric_name=self._metric_name)

    def __call__(self, engine: Engine) -> None:
        if follows_left_out_step(engine):
            return
        if self._metric_name is None:
            self._scheduler.step()
            return
        source = self._metric_engine or engine
        metrics = source.state.metrics
        if self._metric_name not in metrics:
            if self._metric_name in source.metric_names:
                raise KeyError(
                    f"{self._kind} waits for the metric {self._metric_name!r}, which is not computed yet: it "
                    f"is there when an epoch of its engine ends. Attach the schedule to {source!r} at "
                    "Events.EPOCH_COMPLETED, or after the evaluation that computes it."
                )
            raise KeyError(
                f"{self._kind} waits for the metric {self._metric_name!r}, but the engine has "
                f"{', '.join(map(repr, metrics)) or 'none'}: add it, or pass the engine that has it as metric_engine=."
            )
        value = metrics[self._metric_name]
        try:
            score = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{self._kind} compares one number, but the metric {self._metric_name!r} is {value!r}."
            ) from error
        self._scheduler.step(score)

    @property
    def optimizer(self) -> Any:
        """The one whose learning rates are set."""
        return self._scheduler.optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state of the scheduler. The learning rates themselves are in the state of the optimizer."""
        state: dict[str, Any] = self._scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Make the scheduler continue from a `state_dict()`.

        Raises:
            ValueError: it is the state of another kind of scheduler; the message names what differs, and nothing is
                changed.
        """
        own = self._scheduler.state_dict()
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"The state of a schedule is a dict, but got {a_type(state_dict)}.")
        # Names that begin with an underscore come and go with the version of torch.
        different = [name for name in own.keys() ^ state_dict.keys() if not str(name).startswith("_")]
        if different:
            what = "lacks" if different[0] in own else "has the unknown entry"
            raise ValueError(f"The state given to LRScheduler is not one of {self._kind}: it {what} {different[0]!r}.")
        before = copy.deepcopy(own)
        try:
            # A copy: some schedulers empty the dict they are given.
            self._scheduler.load_state_dict(copy.deepcopy(dict(state_dict)))
        except Exception as error:
            self._scheduler.load_state_dict(before)
            raise ValueError(f"The state given to LRScheduler is not one of {self._kind}: {error!r}.") from error


class _Counted:
    """Gives a scheduler that takes the number of the step the interface of torch's, by counting its steps."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.optimizer = getattr(scheduler, "optimizer", None)
        counts_epochs = getattr(scheduler, "t_in_epochs", True) or not hasattr(scheduler, "step_update")
        self._step = scheduler.step if counts_epochs else scheduler.step_update
        self._num_steps = 0

    def step(self, *metric: float) -> None:
        self._num_steps += 1
        self._step(self._num_steps, *metric)

    def state_dict(self) -> dict[str, Any]:
        return {**self._scheduler.state_dict(), "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        own = {name: value for name, value in state_dict.items() if name != "num_steps"}
        self._scheduler.load_state_dict(own)
        self._num_steps = state_dict["num_steps"]


def _takes_step_number(scheduler: Any) -> bool:
    """Whether its `step` needs the number of the step, as in timm."""
    if isinstance(scheduler, type) or not all(
        callable(getattr(scheduler, name, None)) for name in ("step", "state_dict", "load_state_dict")
    ):
        return False
    try:
        parameters = list(inspect.signature(scheduler.step).parameters.values())
    except (TypeError, ValueError):  # in C, or with a wrong `__signature__`
        return False
    is_positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.default is each.empty and each.kind in is_positional]
    return len(needed) == 1 and needed[0].name != "closure"
