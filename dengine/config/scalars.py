"""Find the value of text without quotes, by one rule for YAML, SDN and the command line."""

import math
import re

__all__ = ["bare_value", "finite", "whole"]

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_RADIX = re.compile(r"[-+]?0(?:x[0-9a-fA-F]+|o[0-7]+|b[01]+)")
_FLOAT = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_BOOLS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_NULLS = ("null", "Null", "NULL")
_MAX_DIGITS = 3900  # Python neither reads nor writes an int with more than 4 300


def bare_value(text: str, *, nulls: tuple[str, ...] = ()) -> bool | int | float | str | None:
    """`text` as null, a boolean, a number, or itself. `nulls`: further words for null.

    Text is a number only if all of it is: `1e-3` is a float, `yes` and `007` are text, `1_000` is an int.

    Raises: ValueError: a number is too long or too large; the message says what to do.
    """
    if text in _NULLS or text in nulls:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        return whole(text)
    if _RADIX.fullmatch(text):
        return whole(text, 0)
    if _FLOAT.fullmatch(text):
        return finite(text)
    return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else text


def whole(text: str, base: int = 10) -> int:
    """`text` as an int. Raises: ValueError: it has thousands of digits."""
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} characters is too long: quote it, if it is text")
    return int(text, base)


def finite(text: str) -> float:
    """`text` as a float. Raises: ValueError: it is larger than any float."""
    value = float(text)
    if math.isinf(value):
        short = text if len(text) <= 30 else f"{text[:27]}..."
        raise ValueError(f"{short} is larger than any float: quote it, if it is text")
    return value
