"""Checks of arguments that more than one layer makes."""

import inspect
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["path_of", "takes", "whole_number"]


def whole_number(name: str, value: object, *, least: int, why: str = "") -> int:
    """`value` as an int of at least `least`.

    Raises:
        TypeError: not a whole number; a bool is none.
        ValueError: below `least`; `why` is added to the message.
    """
    try:
        # bool is an int to Python, but `every=True` is a slip.
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}={value!r} must be a whole number, but is a {type(value).__name__}.")
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}{why and ': '}{why}.")
    return number


def takes(function: Callable[..., Any], num_arguments: int) -> bool:
    """Whether `function` can be called with so many positional arguments; True for those that do not tell."""
    try:
        inspect.signature(function).bind(*[None] * num_arguments)
    except ValueError:  # some built-ins
        return True
    except TypeError:
        return False
    return True


def path_of(name: str, value: str | os.PathLike[str]) -> Path:
    """`value` as a path, with the home folder in the place of `~`, as a shell does it.

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
