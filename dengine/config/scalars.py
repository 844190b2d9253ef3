"""What text without quotes means. One rule for YAML, SDN and the command line: a number only if all of it is one."""

import re

__all__ = ["bare_value"]

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_RADIX = re.compile(r"[-+]?0(?:x[0-9a-fA-F]+|o[0-7]+|b[01]+)")
_FLOAT = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_BOOLS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_NULLS = ("null", "Null", "NULL")
_MAX_DIGITS = 4000  # beyond it Python refuses to read an int: such a text is no number that anybody meant


def bare_value(text: str, *, nulls: tuple[str, ...] = ()) -> bool | int | float | str | None:
    """`text` as null, a boolean, a number, or itself. `nulls`: further words for null.

    `1e-3` is a float, `yes` and `007` are text, `1_000` is an int.
    """
    if text in _NULLS or text in nulls:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if len(text) > _MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _RADIX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else text
