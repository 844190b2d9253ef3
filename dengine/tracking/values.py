"""Convert values to recordable ones. Pure: touches no file."""

import json
import math
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
import torch

from dengine import trees
from dengine.dtensor import is_dtensor, local_part
from dengine.errors import RankZeroCollectiveError
from dengine.naming import a_type

__all__ = ["Plain", "RowMaker", "Scalar", "encode", "plain", "scalar", "to_json"]

Scalar: TypeAlias = float | int | bool | str | None
Plain: TypeAlias = "Scalar | list[Plain] | dict[str, Plain]"

_ENCODE = json.JSONEncoder(allow_nan=False).encode
_AS_IT_IS = (float, int, bool, str)
_MOST_BITS = 8192  # in a whole number: 2467 digits
_MAX_DEPTH = 100  # a value that contains itself is deeper


def scalar(name: str, value: object) -> Scalar:
    """`value` as a Python number, bool or string. A tensor is read from its device here, which waits for it.

    Raises:
        TypeError: it is something else; a tensor or an array has more than one element, a type that is not real, or
            cannot be read.
    """
    if type(value) in _AS_IT_IS and not _is_too_long(value):
        return value  # type: ignore[return-value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        if (value.numel() if isinstance(value, torch.Tensor) else value.size) != 1:
            kind = "a tensor" if isinstance(value, torch.Tensor) else "an array"
            raise TypeError(
                f"{name!r} is {kind} of shape {tuple(value.shape)}, and a row holds scalars: log its mean, or its "
                "entries one by one."
            )
        value = _item(name, _own_copy(name, value))
    for kind_of_scalar in (bool, int, float, str):  # subclasses too: np.float64, an IntEnum
        if isinstance(value, kind_of_scalar) and not _is_too_long(value):
            return kind_of_scalar(value)
    raise TypeError(
        f"{name!r} is {_short(value)}, {a_type(value)}: a row holds numbers, bools, strings, and dicts of them."
    )


class RowMaker:
    """Makes rows from logged values. A value that a row cannot hold is left out, with one warning for each name."""

    def __init__(self) -> None:
        self._warned: set[str] = set()  # names

    def row(self, values: Mapping[str, object]) -> dict[str, Scalar]:
        """A row of scalars by name: `{"val": {"acc": tensor(0.5)}}` gives `{"val/acc": 0.5}`; None stays None.

        Raises:
            TypeError: `values` is not a mapping.
            ValueError: two values have one name, or a mapping contains itself.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"log() takes a dict of names to values, but got {_short(values)}.")
        row: dict[str, Scalar] = {}
        reasons: dict[str, str] = {}
        _flatten((), values, row, reasons)
        if reasons and (new := {name: reason for name, reason in reasons.items() if name not in self._warned}):
            self._warned |= new.keys()
            warnings.warn(
                f"Left out of the record: {' '.join(new.values())} This is said once for each name.",
                RuntimeWarning,
                stacklevel=4,
            )
        return row


def encode(row: Mapping[str, Scalar]) -> bytes:
    """`row` as one line of strict JSON: a number that is not finite becomes "NaN", "Infinity" or "-Infinity"."""
    try:
        line = _ENCODE(row)
    except ValueError:
        line = _ENCODE(to_json(row))
    return line.encode() + b"\n"


def plain(value: object, keys: Sequence[object] = ()) -> Plain:
    """`value` as dicts, lists and scalars; anything else becomes its `repr`. `keys` is the path to it.

    Raises: ValueError: a value in it contains itself; the message names the key.
    """
    _refuse_depth(keys)
    if isinstance(value, int) and _is_too_long(value):
        return hex(value)
    if value is None or type(value) in _AS_IT_IS:
        return value  # type: ignore[return-value]
    if isinstance(value, Namespace):
        value = vars(value)
    if (parts := trees.parts(value)) is not None:
        entries = {str(key): plain(each, (*keys, key)) for key, each in parts}
        return entries if trees.has_names(value) else list(entries.values())
    if isinstance(value, (set, frozenset)):
        return [plain(each, (*keys, index)) for index, each in enumerate(sorted(value, key=repr))]
    if isinstance(value, PurePath):
        return str(value)
    try:
        return scalar("", value)
    except (TypeError, RuntimeError, NotImplementedError):  # the latter two: a tensor without data ("meta")
        return repr(value)


def to_json(value: object) -> object:
    """`value`, of dicts, lists and scalars, with numbers that are not finite as strings, as JSON has no such
    numbers.
    """
    if isinstance(value, Mapping):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [to_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value


def _flatten(
    keys: Sequence[object], values: Mapping[Any, Any], row: dict[str, Scalar], reasons: dict[str, str]
) -> None:
    _refuse_depth(keys)
    prefix = "".join(f"{key}/" for key in keys)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            _flatten((*keys, key), value, row, reasons)
        elif name in row or name in reasons:
            raise ValueError(f"There are two values named {name!r} in one row: nested names are joined by '/'.")
        elif value is None:
            row[name] = None
        else:
            try:
                row[name] = scalar(name, value)
            except TypeError as error:
                reasons[name] = str(error)


def _own_copy(name: str, value: Any) -> Any:
    """This rank's copy of a DTensor that all ranks of its mesh have whole. Only rank 0 makes rows.

    Raises: RankZeroCollectiveError: no rank has the whole tensor.
    """
    if not is_dtensor(value):
        return value
    if not all(each.is_replicate() for each in value.placements):
        raise RankZeroCollectiveError(
            f"{name!r} is a DTensor laid out as {value.placements}, which all ranks together would have to make whole, "
            "but only rank 0 logs: have the step give output.full_tensor()."
        )
    return local_part(value)


def _item(name: str, value: torch.Tensor | np.ndarray | np.generic) -> object:
    """The single element. An error of the device is raised unchanged: it is not about this value."""
    try:
        return value.item()
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta"):
            raise
        raise TypeError(f"{name!r} is {a_type(value)} that cannot be read: {error}.") from error


def _is_too_long(value: object) -> bool:
    """Whether it is a whole number with too many digits for Python, or for other readers."""
    return isinstance(value, int) and value.bit_length() > _MOST_BITS


def _refuse_depth(keys: Sequence[object]) -> None:
    if len(keys) > _MAX_DEPTH:
        raise ValueError(
            f"{str(keys[0])!r} cannot be recorded: it contains itself, or is nested more than {_MAX_DEPTH} deep."
        )


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # the user's `repr` may raise anything
        text = object.__repr__(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
