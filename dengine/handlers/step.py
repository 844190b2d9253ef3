"""The step under which a handler saves or logs."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from dengine.checks import whole_number
from dengine.engine import Engine, Events
from dengine.engine.loop import engines_around
from dengine.handlers.arguments import check_function

__all__ = ["StepTransform", "check_step_transform", "step_of", "step_to_save"]

StepTransform: TypeAlias = Callable[[Engine, Any], int]


def check_step_transform(name: str, value: object) -> None:
    """
    Raises:
        TypeError: it is neither None nor can be called as `{name}(engine, event)`.
    """
    check_function(name, value, "engine", "event")


def step_of(engine: Engine, transform: StepTransform | None) -> int:
    """The engine's iteration, or what `transform(engine, event)` gives.

    Raises:
        TypeError, ValueError: that is no whole number of at least 0.
    """
    if transform is None:
        return engine.state.iteration
    return whole_number("The step", transform(engine, engine.firing), least=0)


def step_to_save(engine: Engine, transform: StepTransform | None, objects: Iterable[object]) -> int:
    """`step_of`; for an evaluator, whose iterations begin anew with each run, the iteration of its trainer.

    An evaluator makes one epoch a run and is not among the `objects` that are saved. Its trainer is the engine among
    them, or the one whose handler (or step) runs the evaluation.
    """
    saved = [each for each in objects if isinstance(each, Engine)]
    is_within_epoch = engine.firing in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
    if transform is not None or engine in saved or engine.state.max_epochs != 1 or is_within_epoch:
        return step_of(engine, transform)
    around = engines_around(engine)
    trainers = [each for each in around if each in saved] or around[:1] or (saved if len(saved) == 1 else [])
    return step_of(trainers[0] if trainers else engine, None)
