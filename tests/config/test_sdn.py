"""The reader of SDN: by examples, by a round trip through a writer that is here, and by garbage."""

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine import ConfigError
from dengine.config import sdn
from dengine.config.sdn import read_sdn


def read(text: str) -> Any:
    return read_sdn(text, "x.sdn").data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-17", -17),
        ("1_000_000", 1_000_000),
        ("0x1F", 31),
        ("3.14", 3.14),
        ("1.5e-10", 1.5e-10),
        ("1e-3", 0.001),
        ("-.inf", -math.inf),
        ("true", True),
        ("false", False),
        ("null", None),
        ("nil", None),
        ("Boulder", "Boulder"),
        ("Alice Chen", "Alice Chen"),
        ("2.1.0", "2.1.0"),
        ("0.0.0.0", "0.0.0.0"),
        ("007", "007"),
        ("yes", "yes"),
        ("alice@example.com", "alice@example.com"),
        ("http://host:80/a#b", "http://host:80/a#b"),
        ("text  # a comment", "text"),
        ("${train.lr}", "${train.lr}"),
        ('"Hello, World!"', "Hello, World!"),
        (r'"a\n\t\r\\\"b"  # a comment', 'a\n\t\r\\"b'),
        ('"# no comment"', "# no comment"),
        ('"42"', "42"),
        ("[]", []),
        ("[1, 2.5, text here, [nil]]", [1, 2.5, "text here", [None]]),
        ("[1, 2,]", [1, 2]),
        ("{}", {}),
        ("{a: 1, b-c: {d: x}, }", {"a": 1, "b-c": {"d": "x"}}),
        ("[${oc.env:A,b}, c]", ["${oc.env:A,b}", "c"]),
        ("[\n  1,  # one\n\n  2\n]", [1, 2]),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    expected = {"key": value, "next": 1}
    assert read(f"key: {text}\nnext: 1") == expected
    assert read(f"\n# comment\nkey = {text}\n\n  # comment\nnext: 1\n") == expected
    assert type(read(f"key: {text}")["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", {}),
        ("# nothing\n\n   # here", {}),
        ("a:\nb:  # nothing\nc: 1", {"a": None, "b": None, "c": 1}),
        ("a:\n    b:\n        c: 1\n    d: 2\ne: 3", {"a": {"b": {"c": 1}, "d": 2}, "e": 3}),
        ("a:\r\n  b: 1\r\n", {"a": {"b": 1}}),
        ("a:\n  auth\n  two words\n  3", {"a": ["auth", "two words", 3]}),
        ("a:\n  http://b\nc: 1", {"a": ["http://b"], "c": 1}),
        ("a:\n    {n: Al, r: x}\n    {n: Bo, r: y}", {"a": [{"n": "Al", "r": "x"}, {"n": "Bo", "r": "y"}]}),
        ("a:\n  - 1\n  - x y\n  -\n    b: 1", {"a": [1, "x y", {"b": 1}]}),
        ("a:\n  - k: 1\n    l:\n      m: 2\n  - k: 3\nb: 4", {"a": [{"k": 1, "l": {"m": 2}}, {"k": 3}], "b": 4}),
        ('"a b": 1\nrun-config:\n  x: 1', {"a b": 1, "run-config": {"x": 1}}),
        ("m: table{i32, f64}\n  1, 0\n  2, 3.5\nn: 1", {"m": [[1, 0.0], [2, 3.5]], "n": 1}),
        ("m: table{i32, i32} = [(1, 2), (3, 4)]", {"m": [[1, 2], [3, 4]]}),
        ("m: table{str, bool}\nn: 1", {"m": [], "n": 1}),
        ("p |x, y| 10, 20", {"p": [{"x": 10, "y": 20}]}),
        ('t |a, b|\n  1, "x, y"\n  , [u, v]  # c\n', {"t": [{"a": 1, "b": "x, y"}, {"a": "", "b": ["u", "v"]}]}),
        ("t |u, m|\n  /api/users/{id}, GET", {"t": [{"u": "/api/users/{id}", "m": "GET"}]}),
    ],
)  # fmt: skip
def test_a_document_is_nested_as_it_is_indented(text: str, data: Any) -> None:
    assert read(text) == data


def test_the_example_of_the_documentation_reads_as_it_says() -> None:
    lines = str(sdn.__doc__).split(":\n\n", 1)[1].split("\n\nWords")[0].splitlines()
    data = read("\n".join(line[4:] for line in lines))
    assert data["optimizer"] == {"kind": "adam", "betas": [0.9, 0.999]}
    assert data["data"] == [{"name": "imagenet", "weight": 1.0}, {"name": "my, own", "weight": 0.5}]
    assert data["grid"] == [[1, 0.5]]


def test_every_key_has_its_line() -> None:
    document = read_sdn("a:\n  b: 1\n\n  c = {d: 2,\n    e: 3}\nf:\n  - g: 1\n", "x.sdn")
    lines = {key: place.line for key, place in document.locations.items()}
    assert lines == {"a": 1, "a.b": 2, "a.c": 4, "a.c.d": 4, "a.c.e": 5, "f": 6, "f[0].g": 7}


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1", "'a' is there twice: first in line 1"),
        ("a:\n  b: 1\n  b: 2", "line 3, column 3", "'a.b' is there twice: first in line 2"),
        ("a = {b: 1, b: 2}", "line 1, column 12", "'a.b' is there twice"),
        ("a:\n\tb: 1", "line 2, column 2", "of blanks, not of tabs"),
        ("  a: 1", "line 1, column 3", "the first line must not be indented"),
        ("a: 1\n  b: 2", "line 2, column 3", "indented by 2, but its block by 0"),
        ("a:\n    b: 1\n  c: 2", "line 3, column 3", "indented by 2, but its block by 0"),
        ("just text", "line 1, column 1", "a mapping's line is"),
        ("a: 1\n- b", "line 2, column 1", "a mapping's line is"),
        ("a:\n  - 1\n  2", "line 3, column 3", "every item of this list begins with a dash"),
        ("a:\n  x\n  b: 1", "line 3, column 3", "must be in double quotes"),
        ("a:1", "line 1, column 3", "a blank is needed after the colon"),
        ("a =", "line 1, column 4", "a value is missing"),
        ('a: "open', "line 1, column 4", 'lacks its closing "'),
        ('a: "x" y', "line 1, column 8", "nothing may follow"),
        (r'a: "\q"', "line 1, column 5", r"\q means nothing"),
        ("a: b: c", "line 1, column 4", "must be in double quotes"),
        ("a: 'b'", "line 1, column 4", "must be in double quotes"),
        ("a = [1, 2\nb: 3", "line 2, column 1", "or ] after a value"),
        ("a = [1, 2\n", "line 1, column 5", "lacks its closing ]"),
        ("a = [1 2", "line 1, column 5", "lacks its closing ]"),
        ("a = {b 1}", "line 1, column 8", ": is needed after the key 'b'"),
        ("a = {1: b}", "line 1, column 6", "a key is needed here"),
        ("a = [,]", "line 1, column 6", "a value is missing"),
        ("a = [1] 2", "line 1, column 9", "nothing may follow"),
        ("a = [${b]", "line 1, column 10", "is not closed"),
        ("a |x, y| 1", "line 1, column 10", "1 values, but the table has 2 columns"),
        ("a |x, y|\n  1, 2, 3", "line 2, column 3", "3 values, but the table has 2 columns"),
        ("a |x, x|\n  1, 2", "line 1, column 9", "each of its columns once"),
        ("a |x y|\n  1", "line 1, column 6", "closed by |"),
        ("a: table{i32}\n  x", "line 2, column 3", "'x' is no i32"),
        ("a: table{i33}\n  1", "line 1, column 10", "no type 'i33'"),
        ("a: table{i32} = [1]", "line 1, column 18", "( is needed before a row"),
        ("a: " + "[" * 100, "line 1, column 68", "more than 64 deep"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(100)), "line 65, column 65", "more than 64 deep"),
    ],
)
def test_what_is_no_sdn_is_refused_with_line_and_column(text: str, place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read(text)
    assert str(caught.value).startswith(f"x.sdn, {place}"), str(caught.value)


# -- round trip --------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def quoted(text: str) -> str:
    for plain, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
        text = text.replace(plain, escape)
    return f'"{text}"'


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)}: {inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    if value is None or isinstance(value, bool):
        return {None: "nil", True: "true", False: "false"}[value]
    return repr(value)


def block(value: dict[str, Any], indent: int, draw: Any) -> str:
    lines = []
    for key, inner in value.items():
        head = " " * indent + quoted(key)
        if isinstance(inner, dict) and inner and draw(st.booleans()):
            lines.append(f"{head}:\n{block(inner, indent + 2, draw)}")
        elif isinstance(inner, list) and inner and draw(st.booleans()):
            dash = "- " if draw(st.booleans()) else ""
            rows = "\n".join(" " * (indent + 3) + dash + inline(item) for item in inner)
            lines.append(f"{head}:  # list\n{rows}")
        else:
            lines.append(f"{head}{draw(st.sampled_from([': ', ' = ']))}{inline(inner)}")
        if draw(st.booleans()):
            lines.append(" # a comment\n")
    return "\n".join(lines)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=st.dictionaries(TEXT, VALUES, max_size=5))
def test_what_is_written_is_read_back(data: st.DataObject, value: dict[str, Any]) -> None:
    text = block(value, 0, data.draw)
    found = read(text)
    assert found == value, text
    assert repr(found) == repr(value)  # 1, 1.0 and True are equal


PIECES = st.sampled_from([*"ab:=|-,[]{}()\"'#\\\n\t $1.0e", "  ", "\n  ", ": ", "table{", "i32", "- ", "\r\n", "|a|"])


def outcome(text: str) -> Any:
    """The data, or the message of the one error there may be."""
    try:
        return read(text)
    except ConfigError as error:
        return str(error)


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=40))
def test_garbage_is_read_or_refused_and_nothing_else(text: str) -> None:
    found = outcome(text)
    assert isinstance(found, dict) or re.match(r"x\.sdn, line \d+, column \d+: ", found), found
