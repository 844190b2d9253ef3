"""The number of the step under which a handler saves or logs."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from dengine.checks import whole_number
from dengine.engine import Engine, Events
from dengine.engine.loop import engines_around
from dengine.handlers.arguments import check_function

__all__ = ["StepTransform", "check_step_transform", "step_of"]

StepTransform: TypeAlias = Callable[[Engine, Any], int]


def check_step_transform(name: str, value: object) -> None:
    """Check the argument. Raises: TypeError: `value` is not None and cannot be called as `{name}(engine, event)`."""
    check_function(name, value, "engine", "event")


def step_of(engine: Engine, transform: StepTransform | None, saved: Iterable[object] = ()) -> int:
    """The step: `transform(engine, event)`, or else the iteration of the engine, or of an evaluator's trainer.

    The iterations of an evaluator restart with each run, so they do not identify a step. An evaluator is an engine that
    makes one epoch a run, has `is_trainer` false, and is not one of the objects that are `saved`. Its trainer is the
    engine among these, or the engine whose handler (or step) runs the evaluation. At the events of single iterations
    the evaluator's own iteration is used.

    Raises:
        TypeError, ValueError: `transform` does not give a whole number of at least 0.
    """
    if transform is not None:
        return whole_number("The step", transform(engine, engine.firing), least=0)
    is_within_epoch = engine.firing in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
    if engine.state.max_epochs != 1 or is_within_epoch or engine.is_trainer:
        return engine.state.iteration
    engines = [each for each in saved if isinstance(each, Engine)]
    if engine in engines:
        return engine.state.iteration
    around = engines_around(engine)
    trainers = [each for each in around if each in engines] or around[:1] or (engines if len(engines) == 1 else [])
    return (trainers[0] if trainers else engine).state.iteration
