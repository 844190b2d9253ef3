"""Checks of arguments that more than one layer makes."""

import inspect
import operator
import os
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import TypeGuard

__all__ = ["is_number", "is_whole_number", "number", "path_of", "takes", "whole_number"]


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number of Python's or numpy's. A bool does not count: passing one is a slip."""
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether it is a Python int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(name: str, value: object, what: str = "a number", *, above: float | None = None) -> float:
    """`value`, checked to be an int or float above `above`. The error says that it must be `what`.

    Raises:
        TypeError: it is no number (a bool is none). ValueError: it is not above `above`.
    """
    if not is_number(value):
        raise TypeError(f"{name}={value!r} must be {what}.")
    if above is not None and not value > above:
        raise ValueError(f"{name}={value} must be {what}.")
    return value if isinstance(value, int) else float(value)


def whole_number(name: str, value: object, *, least: int | None, why: str = "") -> int:
    """`value`, checked to be an int of at least `least` (None: of any size).

    Raises:
        TypeError: not a whole number; a bool is none.
        ValueError: below `least`; `why` is added to the message.
    """
    try:
        whole = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        whole = None
    if whole is None:
        raise TypeError(f"{name}={value!r} must be a whole number, but is a {type(value).__name__}.")
    if least is not None and whole < least:
        raise ValueError(f"{name}={whole} must be at least {least}{why and ': '}{why}.")
    return whole


def takes(function: Callable[..., object], num_arguments: int) -> bool:
    """Whether `function` takes `num_arguments` positional arguments; True if its signature is unknown."""
    try:
        inspect.signature(function).bind(*[None] * num_arguments)
    except ValueError:  # some built-ins
        return True
    except TypeError:
        return False
    return True


def path_of(name: str, value: str | os.PathLike[str]) -> Path:
    """`value` as a path, with the home folder for `~`, as in a shell.

    Raises:
        TypeError: `value` is no path. ValueError: there is no such user.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}={value!r} must be a path (str or Path), but is a {type(value).__qualname__}.")
    if not str(value).startswith("~"):  # ./~ is a name
        return Path(value)
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}={os.fspath(value)!r}: {error} Write ./~ for a name that begins so.") from None
