"""Check an archive of `torch.save` before it is loaded: its parts, and the calls in its pickle.

`torch.load(weights_only=True)` calls only functions that it knows. But some of these take memory by a number
(`bytearray(10**10)`, `Tensor(10**6, 10**6)`), or double their argument (`encode(..., "hex")`, again and again).
`torch.save` never writes such a call.
"""

import io
import os
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO

__all__ = ["check_archive", "check_calls"]

_HEADER_BYTES = 30  # of a part of an archive, before its name

_SUSPICIOUS = re.compile(rb"c[\w.]*\n(?:bytearray|encode|\w*Tensor|UntypedStorage|TypedStorage)\n")
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Operations that take values from the top of the stack; the others end at a mark.
_MERGE = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_MERGE_TO_MARK = ("APPENDS", "SETITEMS")
_CONSTANTS = (
    *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT", "BININT1", "BININT2"),
    *("BINFLOAT", "LONG1"),
)


def check_archive(file: BinaryIO) -> None:
    """Check that a zip archive cannot take more memory than the file has bytes.

    Its parts must not be compressed or overlap, and its pickle must not call anything that allocates more.

    Cost: a read of the table of contents, and of the pickle.

    Raises:
        ValueError: the parts are longer than the file, or there is such a call. zipfile.BadZipFile: it is no archive.
    """
    parts = zipfile.ZipFile(file).infolist()
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise ValueError("it has parts that are packed, which torch.save never does")
    if sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size:
        raise ValueError("its parts are together longer than the file")
    if min((part.header_offset for part in parts), default=0):
        raise ValueError("it does not begin with its first part, so that two readers may find two archives in it")
    for part in parts:
        if part.filename.lower().endswith(".pkl"):
            check_calls(_content(file, part))


def _content(file: BinaryIO, part: zipfile.ZipInfo) -> bytes:
    """The bytes of a part that is not compressed. Its CRC-32 is not checked, as a checkpoint has none."""
    file.seek(part.header_offset)
    name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(_HEADER_BYTES).ljust(_HEADER_BYTES, b"\0"))
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
    return file.read(part.file_size)


def check_calls(pickle: bytes) -> None:
    """Refuse a pickle with calls that take more memory than their data in the file.

    Nothing is called here. Cost: one search for names; the operations are only followed if one is found.

    Raises:
        ValueError: there is such a call, or it is not a pickle of `torch.save`.
    """
    if _SUSPICIOUS.search(pickle) is None:
        return
    try:
        _Calls().follow(pickle)
    except (IndexError, KeyError) as error:
        raise ValueError(f"its pickle takes what is not there: {error!r}") from None


class _Global(str):
    """The name of something that can be called."""


@dataclass(frozen=True)
class _Bytes:
    length: int


class _Calls:
    """Follows the operations of a pickle, with a stack of known values: strings, tuples, names, bytes; others are
    None.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0  # bytes: each of them is in the pickle, for one copy or two

    def follow(self, pickle: bytes) -> None:
        for operation, argument, _ in pickletools.genops(io.BytesIO(pickle)):
            self._do(operation.name, argument)
            if self._copied > 2 * len(pickle):
                raise ValueError("its pickle copies the same bytes again and again, which torch.save never does")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUTS:
            self._memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(self._memo[argument])
        elif name == "BINUNICODE":
            stack.append(argument)
        elif name == "SHORT_BINSTRING":
            stack.append(_Bytes(len(argument)))
        elif name in _CONSTANTS:
            stack.append(None)
        elif name == "GLOBAL":
            stack.append(_Global(argument.replace(" ", ".")))
        elif name in _TUPLES:
            num = _TUPLES[name]
            parts = tuple(stack[len(stack) - num :])
            if len(parts) != num:
                raise IndexError(name)
            stack[len(stack) - num :] = [parts]
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack[-1] = _called(stack[-1], arguments)
            self._copied += stack[-1].length if stack[-1] is not None else 0
        elif name in _MERGE:
            del stack[-_MERGE[name] :]
        elif name == "BINPERSID":
            stack[-1] = None
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name == "TUPLE" or name in _MERGE_TO_MARK:
            self._stack = self._marks.pop()
            if name == "TUPLE":
                self._stack.append(tuple(stack))
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"its pickle has the operation {name}, which torch.save never writes")


def _called(function: Any, arguments: Any) -> "_Bytes | None":
    """The known part of the result of a call.

    Raises:
        ValueError: `torch.save` never writes such a call.
    """
    name = function.rpartition(".")[2] if isinstance(function, _Global) else ""
    match name, arguments:
        case ("bytearray", ()) | ("bytearray", (str(), "latin1" | "latin-1")):
            return None
        case "bytearray", (_Bytes(length=length),):
            return _Bytes(length)
        case "encode", (str(text), "latin1" | "latin-1"):
            return _Bytes(len(text))
    if name in ("bytearray", "encode") or name.endswith(("Tensor", "UntypedStorage", "TypedStorage")):
        raise ValueError(f"its pickle calls {function} in a way that torch.save never does")
    return None
