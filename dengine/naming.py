"""Names of things: short texts for a `repr`, and hints for names that other libraries use."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

__all__ = ["a_type", "describe", "other_keywords", "other_names", "printable", "refuse_name", "shown", "type_name"]

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=type)

_LENGTH = 60  # of one value in a repr


def describe(function: object) -> str:
    """The name by which a user recognises something callable."""
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def type_name(value: object) -> str:
    """The name of the type of `value` as the user knows it: a prepared loader is still a `DataLoader`."""
    kinds = (each for each in type(value).__mro__[:-1] if not each.__module__.startswith("dengine."))
    return next(kinds, type(value)).__qualname__


def a_type(value: object) -> str:
    """The name of the type of `value` with its article: "a list", "an int"."""
    name = type(value).__qualname__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def printable(text: str) -> str:
    """`text` with control characters of a terminal (escapes, line ends, marks of direction) written out."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def shown(value: object, /, *first: object, **parts: object) -> str:
    """`Kind(first, name=part, ...)`, for a `__repr__`: one line. A part that is None is left out.

    Functions, models, optimizers and other objects are shown by name only: nothing is read from a device.
    """
    texts = [_text(part) for part in first]
    texts += [f"{name}={_text(part)}" for name, part in parts.items() if part is not None]
    return f"{type(value).__qualname__}({', '.join(texts)})"


def other_names(**instead: str) -> Callable[[C], C]:
    """A class decorator: an attribute that another library would have raises an error with the name used here.

    `hasattr` is False for them. They are looked up as any attribute of the class, so what the class has costs nothing
    more: a `__getattr__` would make each look-up slower.
    """

    def decorate(cls: C) -> C:
        for name, here in instead.items():
            setattr(cls, name, _OtherName(f"{cls.__qualname__} has no {name!r}: {here}."))
        return cls

    return decorate


def other_keywords(**instead: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: a keyword that another library would take raises an error with the name used here."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name in instead:
                    raise TypeError(f"{_called(function)} takes no {name}=: {instead[name]}.")
            return function(*args, **kwargs)

        return call

    return decorate


def refuse_name(module: str, name: str, instead: Mapping[str, str]) -> NoReturn:
    """Raise that `module` has no `name`, with what to write instead if another library has it.

    Raises: AttributeError: always.
    """
    hint = f": {instead[name]}." if name in instead else ""
    raise AttributeError(f"module {module!r} has no attribute {name!r}{hint}")


class _OtherName:
    """A descriptor whose look-up fails. A subclass or an instance may still have an attribute of that name."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __get__(self, instance: object, owner: type | None = None) -> NoReturn:
        raise AttributeError(self._message)


def _called(function: Callable[..., Any]) -> str:
    if function.__name__ == "__call__":
        return f"A call of an {function.__qualname__.partition('.')[0]}"
    return f"{function.__qualname__.removesuffix('.__init__')}()"


def _text(value: object) -> str:
    has_state = hasattr(value, "state_dict")
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(_text(part) for part in value)}]"
    elif callable(value) and not has_state:
        text = describe(value).rpartition("<locals>.")[2]
    else:
        plain = type(value).__repr__ is object.__repr__ or has_state
        text = type(value).__qualname__ if plain else repr(value)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."
