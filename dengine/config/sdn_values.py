"""Read keys of SDN, and values in one line or in brackets."""

import re
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from dengine.config.scalars import bare_value
from dengine.config.source_locations import MAX_DEPTH, Document, SourceLocation, below
from dengine.errors import ConfigError

__all__ = ["MAX_DEPTH", "Reader"]

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"'}
_UNQUOTED_ONLY_INSIDE = "]}),'|"


class Reader:
    """Reads from a position in a text. Every method moves `offset` to the end of the part that it read."""

    def __init__(self, text: str, document: Document) -> None:
        self.text = text
        self.offset = 0
        self._document = document
        self._line_ends = [match.start() for match in re.finditer("\n", text)]

    # -- the position --------------------------------------------------------------------------------------------

    def error(self, message: str, offset: int | None = None) -> ConfigError:
        at = self.offset if offset is None else offset
        line_start = self.text.rfind("\n", 0, at) + 1
        return ConfigError(
            f"{self._document.sources[0]}, line {self.line(at)}, column {at - line_start + 1}: {message}"
        )

    def line(self, offset: int | None = None) -> int:
        return bisect_left(self._line_ends, self.offset if offset is None else offset) + 1

    def peek(self) -> str:
        """The next character; "" at the end of the text."""
        return self.text[self.offset : self.offset + 1]

    def take(self, token: str) -> bool:
        if not self.text.startswith(token, self.offset):
            return False
        self.offset += len(token)
        return True

    def skip_blanks(self) -> None:
        while self.peek() in (" ", "\t"):
            self.offset += 1

    def skip_comment(self) -> None:
        """Skip blanks, and a comment to the end of the line. `#` begins one at the start of a line or after a blank."""
        self.skip_blanks()
        if self.peek() == "#" and (self.offset == 0 or self.text[self.offset - 1] in " \t\n"):
            self.offset = self._line_end()

    def end_line(self) -> None:
        """Go to the next line; this one may have only a comment left."""
        self.skip_comment()
        if self.peek() not in ("", "\n"):
            raise self.error(f"nothing may follow the value here, but there is {self._rest()!r}.")
        self.offset += 1

    def is_at_line_end(self) -> bool:
        self.skip_comment()
        return self.peek() in ("", "\n")

    # -- keys ----------------------------------------------------------------------------------------------------

    def key(self) -> str | None:
        """A key, quoted or not; None if there is none, and then nothing was read."""
        if self.peek() == '"':
            return self.quoted()
        found = _KEY.match(self.text, self.offset)
        if found is None:
            return None
        self.offset = found.end()
        return found.group()

    def add(self, mapping: dict[str, object], prefix: str, key: str, offset: int) -> str:
        """The full key of `key`, which was read at `offset`. Raises: ConfigError: it is in `mapping` already."""
        full = below(prefix, key)
        if key in mapping:
            raise self.error(f"{full!r} is there twice: first in line {self._document.location(full).line}.", offset)
        self._document.locations[full] = SourceLocation(self._document.sources[0], self.line(offset))
        return full

    # -- values --------------------------------------------------------------------------------------------------

    def value(self, full: str) -> object:
        """The single value in the rest of this line; in brackets, it may span several lines."""
        self.skip_blanks()
        return self._bracketed(full, 1) if self.peek() in ("{", "[") else self._scalar("")

    def row(self, full: str) -> list[object]:
        """The values of a table's row, up to the end of the line."""
        cells: list[object] = []
        while True:
            self.skip_blanks()
            if self.peek() == "," or self.is_at_line_end():
                cells.append("")
            else:
                inner = below(full, len(cells))
                cells.append(self._bracketed(inner, 1) if self.peek() in ("{", "[") else self._scalar(","))
            if self.is_at_line_end():
                return cells
            self._expect(",", "between the values of a row")

    def tuples(self, full: str) -> list[list[object]]:
        """The rows of a table in brackets: `[(1, 2), (3, 4)]`."""
        rows: list[list[object]] = []
        self.skip_blanks()
        self._expect("[", "before the rows of a table")

        def one() -> None:
            self._expect("(", "before a row of a table")
            row: list[object] = []
            self._items(")", lambda: row.append(self._nested(below(full, len(rows)), 1)))
            rows.append(row)

        self._items("]", one)
        return rows

    def quoted(self) -> str:
        start = self.offset
        self.offset += 1
        parts: list[str] = []
        while (character := self.peek()) != '"':
            if character in ("", "\n"):
                raise self.error('the text that begins here lacks its closing ".', start)
            self.offset += 1
            if character == "\\":
                if self.peek() not in _ESCAPES or not self.peek():
                    raise self.error(
                        rf"\{self.peek()} means nothing: there are \n, \t, \r, \\ and \".", self.offset - 1
                    )
                character = _ESCAPES[self.peek()]
                self.offset += 1
            parts.append(character)
        self.offset += 1
        return "".join(parts)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _scalar(self, delimiters: str) -> Any:
        if self.peek() == '"':
            return self.quoted()
        start = self.offset
        self._skip_bare(delimiters)
        text = self.text[start : self.offset].rstrip(" \t")
        if not text:
            raise self.error("a value is missing here.", start)
        if text[0] in _UNQUOTED_ONLY_INSIDE:
            raise self.error(f'text that begins with {text[0]} must be in double quotes: "{text}".', start)
        if ": " in text or text.endswith(":"):
            raise self.error(f'text with a colon before a blank must be in double quotes: "{text}".', start)
        try:
            return bare_value(text, nulls=("nil",))
        except ValueError as error:
            raise self.error(f"{error}.", start) from error

    def _skip_bare(self, delimiters: str) -> None:
        """Skip to a delimiter, a comment or the end of the line. Text in braces, as in `${a:b}`, has no delimiters."""
        end, depth = self._line_end(), 0
        while self.offset < end:
            character = self.text[self.offset]
            is_comment = character == "#" and self.text[self.offset - 1] in " \t"
            if depth == 0 and (is_comment or character in delimiters):
                return
            if delimiters:
                depth = max(depth + (character == "{") - (character == "}"), 0)
            self.offset += 1
        if depth:
            raise self.error("a { in this text is not closed: put the text into double quotes.")

    def _bracketed(self, full: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.error(f"brackets are nested more than {MAX_DEPTH} deep.")
        if self.take("["):
            values: list[Any] = []
            self._items("]", lambda: values.append(self._nested(below(full, len(values)), depth)))
            return values
        self.take("{")
        mapping: dict[str, object] = {}

        def pair() -> None:
            start = self.offset
            key = self.key()
            if key is None:
                raise self.error(f"a key is needed here, but there is {self._rest()!r}.")
            inner = self.add(mapping, full, key, start)
            self.skip_blanks()
            self._expect(":", f"after the key {key!r}")
            self._skip_space()
            mapping[key] = self._nested(inner, depth)

        self._items("}", pair)
        return mapping

    def _nested(self, full: str, depth: int) -> Any:
        return self._bracketed(full, depth + 1) if self.peek() in ("{", "[") else self._scalar(",]})")

    def _items(self, closing: str, read: Callable[[], None]) -> None:
        """Call `read` for each item up to `closing`; a comma may follow the last one."""
        start = self.offset - 1
        while True:
            self._skip_space()
            if self.take(closing):
                return
            if not self.peek():
                raise self.error(f"the bracket that opens here lacks its closing {closing}.", start)
            read()
            self._skip_space()
            if self.peek() and self.peek() != closing:
                self._expect(",", f"or {closing} after a value in brackets")

    def _skip_space(self) -> None:
        """Skip blanks, comments and ends of lines."""
        self.skip_comment()
        while self.peek() == "\n":
            self.offset += 1
            self.skip_comment()

    def _expect(self, token: str, where: str) -> None:
        if not self.take(token):
            raise self.error(f"{token} is needed {where}, but there is {self._rest() or 'the end of the line'!r}.")

    def _line_end(self) -> int:
        end = self.text.find("\n", self.offset)
        return len(self.text) if end < 0 else end

    def _rest(self) -> str:
        rest = self.text[self.offset : self._line_end()].strip()
        return rest if len(rest) <= 30 else f"{rest[:30]}..."
