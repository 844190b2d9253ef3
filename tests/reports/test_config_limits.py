"""A small file cannot make a large configuration, and whatever is odd in it is told in the user's words."""

import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dengine import ConfigError
from dengine.config import Conf
from dengine.config.sdn import read_sdn
from dengine.config.yaml_text import read_yaml

NAMES = list(zip(string.ascii_lowercase, string.ascii_lowercase[1:], strict=False))
FORMATS = {".yaml": "a: {}", ".json": '{{"a": {}}}', ".toml": "a = {}", ".sdn": "a: {}"}


def lines(first: str, each: str) -> str:
    """`each` for every letter but the first, with the letter before as {0} and its own as {1}."""
    return "".join([first, *(each.format(*names) for names in NAMES)])


BOMBS = {
    "lists.yaml": lines("a: &a [1, 2]\n", "{1}: &{1} [*{0}, *{0}]\n"),
    "mappings.yaml": lines("a: &a {x: 1}\n", "{1}: &{1} {{x: *{0}, y: *{0}}}\n"),
    "merges.yaml": lines("a: &a {x: 1}\n", "{1}: &{1} {{<<: [*{0}, *{0}]}}\n"),
    "text.yaml": lines("a: 0123456789\n", "{1}: ${{{0}}}${{{0}}}\n"),
    "text.sdn": lines("a: 0123456789\n", "{1}: ${{{0}}}${{{0}}}\n"),
    "text.toml": lines("a = '0123456789'\n", "{1} = '${{{0}}}${{{0}}}'\n"),
    "relative.yaml": lines("m:\n  a: 0123456789\n", "  {1}: ${{.{0}}}${{.{0}}}\n"),
    "parts.yaml": lines("a: {x: 1}\n", "{1}: {{x: '${{{0}}}', y: '${{{0}}}'}}\n"),
    "lists_of_parts.yaml": lines("a: [1]\n", "{1}: ['${{{0}}}', '${{{0}}}']\n"),
    "inside.yaml": lines("a: {x: 0123456789}\n", "{1}: {{x: '${{{0}.x}}${{{0}.x}}'}}\n"),
    "through.yaml": lines("a: {x: 1}\nr: ${a}\n", "{1}1: {{x: '${{{0}1.x}}${{r.x}}${{{0}1.x}}'}}\n"),
    "select.yaml": lines("a: 0123456789\n", "{1}: ${{oc.select:{0}}}${{oc.select:{0}}}\n"),
    "default.yaml": lines("a: 0123456789\n", "{1}: ${{oc.env:NO_SUCH,${{{0}}}}}${{oc.env:NO_SUCH,${{{0}}}}}\n"),
    "named.yaml": lines("n:\n  a: 0123456789\n", "  {1}: ${{n.${{k.{0}}}}}${{n.${{k.{0}}}}}\n")
    + "k:\n"
    + "".join(f"  {letter}: {letter}\n" for letter in string.ascii_lowercase),
}


@pytest.mark.parametrize("name", BOMBS)
def test_values_that_refer_to_each_other_do_not_grow_without_bound(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(BOMBS[name])
    with pytest.raises(ConfigError, match="refer"):
        Conf.load(tmp_path / name)


def test_bombs_are_refused_from_a_dict_an_argument_and_a_merge() -> None:
    shared: Any = [1]
    texts = {"a": "0123456789"} | {own: f"${{{before}}}" * 2 for before, own in NAMES}
    for _ in range(40):
        shared = [shared, shared]
    aliases = ", ".join(f"{own}: &{own} [*{before}, *{before}]" for before, own in NAMES)
    half = list(texts.items())
    for make in (
        lambda: Conf.from_dict({"a": shared}),
        lambda: Conf.from_dict(texts),
        lambda: Conf.from_cli_dotlist([f"a={{a: &a [1, 2], {aliases}}}"]),
        lambda: Conf.from_cli_dotlist([f"{key}={value}" for key, value in texts.items()]),
        lambda: Conf.merge(dict(half[:10]), dict(half[10:])),
    ):
        with pytest.raises(ConfigError, match="refer"):
            make()


def test_ordinary_aliases_and_references_work() -> None:
    base = {f"k{index}": index for index in range(50)}
    cfg = Conf.from_dict({"base": base, "name": "run", **{f"x{index}": "${base}" for index in range(100)}})
    assert Conf.to_dict(cfg)["x99"] == base
    nested = {"models": {"a": {"size": 1}, "b": {"size": 2}}, "which": "b", "model": "${models.${which}}"}
    assert Conf.from_dict(nested).model.size == 2
    assert Conf.from_dict({"a": "${b}", "b": "${c}", "c": [1, "${d}"], "d": 2}).a == [1, 2]


def test_many_uses_of_an_anchor_are_fine(tmp_path: Path) -> None:
    base = "".join(f"  k{index}: {index}\n" for index in range(20))
    (tmp_path / "a.yaml").write_text(f"base: &b\n{base}" + "".join(f"x{index}: *b\n" for index in range(200)))
    assert Conf.load(tmp_path / "a.yaml").x199.k19 == 19


def test_many_merges_into_one_mapping_take_linear_time_and_the_first_counts(tmp_path: Path) -> None:
    bases = ", ".join(f"{{k{index}: {index}, same: {index}}}" for index in range(4_000))
    document = read_yaml(f"a: {{<<: [{bases}], k7: own}}", "a.yaml")[0]["a"]
    assert (len(document), document["same"], document["k7"], document["k3999"]) == (4_001, 0, "own", 3_999)


# -- size ----------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_lines_are_read_with_the_line_of_each() -> None:
    """In time that grows with their number: with its square, this test alone would take minutes."""
    document = read_sdn("".join(f"k{index}: {index}\n" for index in range(100_000)))
    assert document.data["k99999"] == 99_999
    assert document.locations["k99999"].line == 100_000


def test_a_thousand_arguments_are_merged() -> None:
    known = Conf.from_dict({"a": {f"k{index}": 0 for index in range(1000)}})
    cfg = Conf.from_cli_dotlist([f"a.k{index}={index}" for index in range(1000)], known=known)
    assert cfg.a.k999 == 999


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_larger_than_any_configuration_is_refused_before_it_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.touch()
    os.truncate(path, 1 << 40)  # takes no room on the disk
    with pytest.raises(ConfigError, match="MiB"):
        Conf.load(path)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").symlink_to("/dev/zero")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match="pipe or a device"):
            Conf.load(tmp_path / name)
    with pytest.raises(ConfigError, match="no path"):
        Conf.load("a\0.yaml")


# -- keys and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['{"a.b": 1, "a": {"b": 2}}', '{"a": {"b": 2}, "a.b": 1}', '{"a[0]": 1, "a": [1]}'])
def test_a_key_with_a_dot_is_not_another_key_inside(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    Conf.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text", ['{"a.b": 1,\n "a.b": 1}', '{"a": {"b": 2,\n "b": 3}}', '{"a.b": 1, "a": {"b": 2},\n "a": 1}']
)
def test_a_key_that_is_there_twice_is_told_with_both_lines(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="line 2: 'a(.b)?' is there twice: first in line 1"):
        Conf.load(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 4200, "9" * 5000 + ".5", "1e999", "-1e999"])
def test_a_number_that_no_number_can_hold_is_an_error_that_names_the_file(
    suffix: str, number: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(FORMATS[suffix].format(number))
    with pytest.raises(ConfigError, match=rf"a\{suffix}") as caught:
        Conf.load(path)
    assert "sys." not in str(caught.value)
    path.write_text(FORMATS[suffix].format(f'"{number}"'))
    assert Conf.load(path).a == number


def test_a_number_of_5000_digits_is_refused_from_a_dict_and_an_argument() -> None:
    for make in (lambda: Conf.from_dict({"a": 10**5000}), lambda: Conf.from_cli_dotlist(["a=" + "9" * 5000])):
        with pytest.raises(ConfigError, match="quote it"):
            make()


# -- depth ---------------------------------------------------------------------------------------------------------

DEEP: dict[str, Callable[[int], str]] = {
    "a.json": lambda depth: '{"a": ' + "[" * depth + "]" * depth + "}",
    "b.json": lambda depth: '{"a": ' * depth + "1" + "}" * depth,
    "a.yaml": lambda depth: "a: " + "[" * depth + "]" * depth,
    "b.yaml": lambda depth: "a: " + "{b: " * depth + "1" + "}" * depth,
    "c.yaml": lambda depth: "a:\n  " + "- " * depth + "1",
    "a.toml": lambda depth: "a = " + "[" * depth + "]" * depth,
    "b.toml": lambda depth: ".".join("a" * depth) + " = 1",
    "c.toml": lambda depth: f"[{'.'.join('a' * depth)}]",
    "d.toml": lambda depth: "a = " + "{b = " * depth + "1" + "}" * depth,
    "a.sdn": lambda depth: "a: " + "[" * depth + "]" * depth,
    "b.sdn": lambda depth: "a: " + "{b: " * depth + "1" + "}" * depth,
}


@pytest.mark.parametrize("depth", [70, 500, 100_000])
@pytest.mark.parametrize("name", DEEP)
def test_what_is_nested_too_deep_is_told_so(name: str, depth: int, tmp_path: Path) -> None:
    (tmp_path / name).write_text(DEEP[name](depth))
    with pytest.raises(ConfigError, match="nested"):
        Conf.load(tmp_path / name)


@pytest.mark.parametrize("argument", ["a=" + "[" * 5000, "a=&a [*a]", ".".join("a" * 5000) + "=1", "a=" + "{a: " * 100])
def test_an_argument_that_is_nested_too_deep_is_told_so(argument: str) -> None:
    with pytest.raises(ConfigError):
        Conf.from_cli_dotlist([argument])


def test_what_is_nested_60_deep_can_be_used() -> None:
    deep: Any = 1
    for _ in range(60):
        deep = {"a": deep}
    cfg = Conf.from_dict(deep)
    assert Conf.to_dict(Conf.freeze(Conf.merge(cfg, {"b": 1}))) == {**deep, "b": 1}
