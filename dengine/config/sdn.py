"""Simple Data Notation: a reader for configuration files that refuses what it does not understand.

A document is a mapping of keys, nested by indentation:

    # a comment: at the start of a line, or after a blank
    name: Residual network     # text needs no quotes; it ends with the line
    lr: 1e-3                   # a number only if all of it is one
    optimizer:                 # an indented block: a mapping ...
        kind: adam
        betas = [0.9, 0.999]   # in brackets, which may span lines
    stages:                    # ... or a list, one value a line; `- value` is a list too
        64
        128
    data |name, weight|        # a table: a list of mappings with these keys
        imagenet, 1.0
        "my, own", 0.5
    grid: table{i32, f64}      # a table without names: a list of lists, whose types are checked
        1, 0.5

Words: `true`, `false`, `null`, `nil`; a key without a value is null. Quoted text knows \\n, \\t, \\r, \\\\ and \\".
A key is a name (letters, digits, `_` and `-`) or quoted text. A key that is there twice, a tab in an indentation, and a
line that fits no rule are errors, with the line and the column.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from dengine.checks import is_number, is_whole_number
from dengine.config.sdn_values import MAX_DEPTH, Reader
from dengine.config.source_locations import Document, below

__all__ = ["read_sdn"]

T = TypeVar("T")

_INTS = ("i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "int")
_FLOATS = ("f16", "f32", "f64", "float")
_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_INTS, is_whole_number),
    **dict.fromkeys(_FLOATS, is_number),
    **dict.fromkeys(("str", "string", "text"), lambda value: isinstance(value, str)),
    "bool": lambda value: isinstance(value, bool),
}


def read_sdn(text: str, source: str = "SDN text") -> Document:
    """The mapping that `text` holds, and the line of each key.

    Raises:
        ConfigError: the text is not SDN; the message has `source`, the line and the column.
    """
    document = Document({}, (source,))
    blocks = _Blocks(Reader(text.replace("\r\n", "\n"), document))
    if (indent := blocks.next_indent()) > 0:
        raise blocks.reader.error("the first line must not be indented.")
    if indent == 0:
        document.data.update(blocks.mapping("", 0, 1))
    return document


class _Blocks:
    """Reads line by line. The indentation decides which lines belong together."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._found: tuple[int, int] | None = None  # (offset, indentation) of the next line to read

    def next_indent(self) -> int:
        """Go to the first character of the next line that is not empty, and give its indentation; -1 at the end.

        A second call before anything is read gives the same.
        """
        if self._found is None or self._found[0] != self.reader.offset:
            indent = self._skip_empty_lines()
            self._found = self.reader.offset, indent
        return self._found[1]

    def block(self, full: str, outer: int, depth: int) -> object:
        """The value of the lines below a key that are indented further: a mapping, a list, or null if there are
        none.
        """
        indent = self._indent_of_rows(outer)
        if indent is None:
            return None
        if depth > MAX_DEPTH:
            raise self.reader.error(f"blocks are nested more than {MAX_DEPTH} deep.")
        if self._is_dash():
            return self._rows(indent, lambda index: self._dashed(below(full, index), indent, depth))
        if self._is_entry():
            return self.mapping(full, indent, depth)
        return self._rows(indent, lambda index: self._line(below(full, index)))

    def mapping(self, full: str, indent: int, depth: int) -> dict[str, object]:
        mapping: dict[str, object] = {}
        while self._goes_on(indent):
            start = self.reader.offset
            key = self.reader.key()
            self.reader.skip_blanks()
            if key is None or self.reader.peek() not in (":", "=", "|"):
                raise self.reader.error("a mapping's line is `key: value`, `key = [...]` or `key |name, name|`.", start)
            inner = self.reader.add(mapping, full, key, start)
            mapping[key] = self._entry(inner, indent, depth)
        return mapping

    # -- entries -------------------------------------------------------------------------------------------------

    def _entry(self, full: str, indent: int, depth: int) -> object:
        reader = self.reader
        if reader.take("|"):
            return self._named_table(full, indent)
        is_short = reader.take("=")
        if not is_short:
            reader.take(":")
            if reader.peek() not in ("", " ", "\t", "\n"):
                raise reader.error("a blank is needed after the colon.")
            if reader.is_at_line_end():
                reader.end_line()
                return self.block(full, indent, depth + 1)
            if reader.take("table{"):
                return self._typed_table(full, indent)
        return self._line(full)

    def _line(self, full: str) -> object:
        value = self.reader.value(full)
        self.reader.end_line()
        return value

    def _dashed(self, full: str, indent: int, depth: int) -> object:
        """`- value`, or `- key: value` with the mapping's other lines below its first key."""
        reader = self.reader
        if not self._is_dash():
            raise reader.error("every item of this list begins with a dash.")
        start = reader.offset
        reader.offset += 1
        reader.skip_blanks()
        if reader.is_at_line_end():
            reader.end_line()
            return self.block(full, indent, depth + 1)
        if not self._is_entry():
            return self._line(full)
        column = indent + reader.offset - start
        if depth >= MAX_DEPTH:
            raise reader.error(f"blocks are nested more than {MAX_DEPTH} deep.")
        self._found = reader.offset, column  # as if its first key were in a line of its own
        return self.mapping(full, column, depth + 1)

    # -- tables --------------------------------------------------------------------------------------------------

    def _named_table(self, full: str, indent: int) -> list[dict[str, object]]:
        names = self._names("|", "names of a table")
        if len(set(names)) < len(names):
            raise self.reader.error("a table names each of its columns once.")
        return [dict(zip(names, row, strict=True)) for row in self._table_rows(full, indent, len(names))]

    def _typed_table(self, full: str, indent: int) -> list[list[object]]:
        reader, start = self.reader, self.reader.offset
        types = self._names("}", "types of a table")
        if unknown := [name for name in types if name not in _CHECKS]:
            raise reader.error(f"there is no type {unknown[0]!r}; known are {', '.join(_CHECKS)}.", start)
        reader.skip_blanks()
        if not reader.take("="):
            return self._table_rows(full, indent, len(types), types)
        offset = reader.offset
        rows = reader.tuples(full)
        for row in rows:
            self._check_row(row, len(types), types, offset)
        reader.end_line()
        return [_typed(row, types) for row in rows]

    def _names(self, closing: str, what: str) -> list[str]:
        reader, names = self.reader, list[str]()
        while True:
            reader.skip_blanks()
            name = reader.key()
            reader.skip_blanks()
            if name is None or reader.peek() not in (",", closing):
                raise reader.error(f"the {what} are written as `name, name` and closed by {closing}")
            names.append(name)
            if reader.take(closing):
                return names
            reader.take(",")

    def _table_rows(self, full: str, outer: int, width: int, types: list[str] | None = None) -> list[list[object]]:
        def row(index: int) -> list[object]:
            start = self.reader.offset
            cells = self.reader.row(below(full, index))
            self._check_row(cells, width, types, start)
            self.reader.end_line()
            return cells if types is None else _typed(cells, types)

        if not self.reader.is_at_line_end():
            return [row(0)]
        self.reader.end_line()
        indent = self._indent_of_rows(outer)
        return [] if indent is None else self._rows(indent, row)

    def _check_row(self, cells: list[object], width: int, types: list[str] | None, offset: int) -> None:
        if len(cells) != width:
            raise self.reader.error(f"this row has {len(cells)} values, but the table has {width} columns.", offset)
        for cell, kind in zip(cells, types or (), strict=False):
            if not _CHECKS[kind](cell):
                raise self.reader.error(f"{cell!r} is no {kind}, as the table's head demands.", offset)

    # -- lines ---------------------------------------------------------------------------------------------------

    def _indent_of_rows(self, outer: int) -> int | None:
        indent = self.next_indent()
        return indent if indent > outer else None

    def _goes_on(self, indent: int) -> bool:
        """Whether the next line belongs to the block of `indent`."""
        found = self.next_indent()
        if found > indent:
            raise self.reader.error(f"this line is indented by {found}, but its block by {indent}.")
        return found == indent

    def _skip_empty_lines(self) -> int:
        reader = self.reader
        while True:
            start = reader.offset
            while reader.take(" "):
                pass
            indent = reader.offset - start
            if reader.peek() == "\t" and not reader.is_at_line_end():
                raise reader.error("an indentation is made of blanks, not of tabs.")
            if not reader.is_at_line_end():
                return indent
            if not reader.peek():
                return -1
            reader.offset += 1

    def _rows(self, indent: int, read: Callable[[int], T]) -> list[T]:
        rows: list[T] = []
        while self._goes_on(indent):
            rows.append(read(len(rows)))
        return rows

    def _is_dash(self) -> bool:
        text, offset = self.reader.text, self.reader.offset
        return text[offset : offset + 1] == "-" and text[offset + 1 : offset + 2] in ("", " ", "\t", "\n")

    def _is_entry(self) -> bool:
        """Whether a line of a mapping begins here: a key, then a colon and a blank, `=`, or the `|` of a table."""
        reader, start = self.reader, self.reader.offset
        key = reader.key()
        reader.skip_blanks()
        sign, following = reader.peek(), reader.text[reader.offset + 1 : reader.offset + 2]
        reader.offset = start
        if sign == ":":
            return key is not None and following in ("", " ", "\t", "\n")
        return key is not None and sign in ("=", "|")


def _typed(row: list[Any], types: list[str]) -> list[object]:
    return [float(cell) if kind in _FLOATS else cell for cell, kind in zip(row, types, strict=True)]
