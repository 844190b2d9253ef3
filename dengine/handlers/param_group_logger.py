"""Log learning rates and momenta to a tracked run, on rank 0."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dengine.distributed import world
from dengine.engine import Engine
from dengine.handlers.step import StepTransform, check_step_transform, step_of
from dengine.handlers.tracking_handler import sink_of
from dengine.naming import other_keywords, other_names, shown

__all__ = ["ParamGroupLogger"]


class HasParamGroups(Protocol):
    """An object with parameter groups: an optimizer, or a wrapper of one."""

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]: ...


@other_names(
    attach="it takes one event, so write trainer.on(Events.ITERATION_COMPLETED(every=10), handler)",
)
class ParamGroupLogger:
    """Logs the learning rate of each parameter group, and its momentum or betas, whenever it is called.

    The names are `lr`, `momentum`, `beta1`, `beta2`; with several groups `lr/0`, `lr/1`, or `lr/<name>` if a group has
    a "name". Attach it on every rank: rank 0 logs. It is not a collective.

    Args:
        optimizer: any object with `param_groups`.
        run: as for `TrackingHandler`.
        global_step_transform: `(engine, event) -> int`; by default as for `TrackingHandler`.

    Raises:
        TypeError: `optimizer` has no `param_groups`, `run` cannot be logged to, or the transform cannot be called.

    Example:
        >>> import tempfile, torch
        >>> from dengine import Engine, Events
        >>> from dengine.tracking import Track
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        >>> trainer = Engine(lambda engine, batch: batch)
        >>> with Track.run("example", dir=tempfile.mkdtemp()) as run:
        ...     handle = trainer.on(Events.EPOCH_COMPLETED, ParamGroupLogger(optimizer, run))
        ...     state = trainer.run([0])
        >>> run.summary
        {'lr': 0.1, 'momentum': 0.9}
    """

    @other_keywords(
        logger="it is called run=",
    )
    def __init__(
        self, optimizer: HasParamGroups, run: object, global_step_transform: StepTransform | None = None
    ) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"ParamGroupLogger() takes an optimizer with param_groups, but got {optimizer!r}.")
        check_step_transform("global_step_transform", global_step_transform)
        self._optimizer = optimizer
        self._step_transform = global_step_transform
        self._sink = sink_of(run) if world().rank == 0 else None

    def __repr__(self) -> str:
        return shown(self, self._optimizer)

    def __call__(self, engine: Engine) -> None:
        if self._sink is None:
            return
        groups = self._optimizer.param_groups
        values: dict[str, Any] = {}
        for index, group in enumerate(groups):
            suffix = f"/{group.get('name', index)}" if len(groups) > 1 else ""
            for name in ("lr", "momentum"):
                if name in group:
                    values[name + suffix] = group[name]
            for number, beta in enumerate(group.get("betas", ()), start=1):
                values[f"beta{number}{suffix}"] = beta
        self._sink(values, step_of(engine, self._step_transform))
