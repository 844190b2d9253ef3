"""Check handlers and steps, read the properties that handlers declare, and warn of those that fail or never run."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from dengine.engine.phases import Phase
from dengine.naming import describe

__all__ = [
    "check_handler",
    "check_process_function",
    "collective",
    "is_collective",
    "owner_of",
    "phase_of",
    "precedes_saves",
    "warn_of_failure",
    "warn_of_idle",
]

_C = TypeVar("_C", bound="Callable[..., Any]")


def check_handler(handler: object) -> None:
    """Refuse a handler that cannot be called as `handler(engine)`.

    Raises:
        TypeError: it cannot; the message shows the handler and its signature.
    """
    if not callable(handler):
        hint = ""
        if hasattr(handler, "attach"):
            hint = f": it needs several events, so attach it by {type(handler).__qualname__}(...).attach(engine)"
        raise TypeError(f"A handler is called as handler(engine), but {handler!r} is not callable{hint}.")
    _check_call("Handler", handler, ("engine",), "Bind what else it needs, e.g. with functools.partial or a lambda.")


def check_process_function(function: object) -> None:
    """Refuse a step that cannot be called as `process_function(engine, batch)`.

    Raises:
        TypeError: it cannot; the message shows the function and its signature.
    """
    if not callable(function):
        raise TypeError(f"Engine() takes a function (engine, batch) -> output, but got {function!r}.")
    _check_call(
        "The process function", function, ("engine", "batch"), "Its first argument is the engine, its second the batch."
    )


def _check_call(what: str, function: Callable[..., Any], arguments: tuple[str, ...], way_out: str) -> None:
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{what} {describe(function)} is an async function: a call of it would run nothing.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-ins do not show their arguments
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        called = f"{'handler' if len(arguments) == 1 else 'process_function'}({', '.join(arguments)})"
        raise TypeError(
            f"{what} {describe(function)}{signature} cannot be called as {called}: {error}. {way_out}"
        ) from None


def collective(method: _C) -> _C:
    """Mark `method`, which is attached as a handler, as collective: all ranks must have it.

    The ranks compare their collective handlers at the start of a run. A handler that is an object declares it by an
    attribute `is_collective`.
    """
    method.is_collective = True  # type: ignore[attr-defined]
    return method


def is_collective(handler: object) -> bool:
    """Whether `handler` declares that all ranks must have it (see `collective`)."""
    return bool(getattr(_inside(handler), "is_collective", False))


def precedes_saves(handler: object) -> bool:
    """Whether `handler` is also called before each save, as it says itself by an attribute of this name."""
    return bool(getattr(_inside(handler), "precedes_saves", False))


def phase_of(handler: object) -> Phase:
    """The phase of an event that `handler` declares for itself."""
    phase: Phase = getattr(_inside(handler), "phase", Phase.ACT)
    return phase


def _inside(handler: object) -> Any:
    """The object or function that is called in the end: inside a `functools.partial`, or by its `__call__`."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    is_call = getattr(handler, "__name__", "") == "__call__"
    return getattr(handler, "__self__", handler) if is_call else handler


def owner_of(handler: object) -> str:
    """The name of the class whose method `handler` is, else the name of `handler`."""
    inside = _inside(handler)
    owner = getattr(inside, "__self__", None)
    return describe(inside) if owner is None else type(owner).__qualname__


def warn_of_failure(failure: Exception, handler: Callable[..., object], error: BaseException) -> None:
    """Warn that `handler` raised `failure` while it handled `error`."""
    with suppress(RuntimeWarning):  # if warnings are errors, it must still be `error` that is raised
        warnings.warn(
            f"Handler {describe(handler)} of EXCEPTION_RAISED failed itself with {failure!r}, "
            f"while handling {error!r}.",
            RuntimeWarning,
            stacklevel=3,
        )


def warn_of_idle(idle: list[str]) -> None:
    """Warn that the handlers in `idle`, each with the number of times its event came, were never called in a run."""
    more = f"; and {len(idle) - 3} more" if len(idle) > 3 else ""
    warnings.warn(
        f"The counts of this run did not reach some handlers: {'; '.join(idle[:3])}{more}. Counts begin anew with each "
        "run. On an evaluator, ask for the trainer's: filter=lambda engine, count: trainer.state.epoch >= 5; "
        "EarlyStopping has start_after=. This is said once.",
        RuntimeWarning,
        stacklevel=4,
    )
