"""Read YAML for configurations: plain values by our own rule, a line for each key, and no key twice."""

from collections.abc import Callable
from typing import Any

from dengine.checks import is_whole_number
from dengine.config.scalars import bare_value, finite, whole
from dengine.config.source_locations import Document, Repeats, SourceLocation, below
from dengine.errors import ConfigError

__all__ = ["parse_value", "read_yaml"]

_PLAIN = "!plain"
_STR, _INT, _FLOAT = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_TAGGED: dict[str, Callable[[str], Any]] = {_STR: str, "!": str, _INT: whole, _FLOAT: finite}


def read_yaml(text: str, source: str) -> tuple[object, Document]:
    """The value in `text`, and a document with the line of each key. Anchors, aliases and `<<` work.

    Raises:
        ConfigError: the text is not YAML, has a key twice, or a tag that is not for plain data; or aliases turn a few
            values into thousands.
    """
    document = Document({}, (source,))
    root = _compose(text, source)
    return (None if root is None else _Builder(document).build(root, "")), document


def parse_value(text: str, source: str) -> object:
    """One value, as it could follow a key in a file; empty text is null.

    Raises:
        ConfigError: as `read_yaml`, or there is a comment, which cannot be intended here.
    """
    try:
        return _parsed(text, source)
    except RecursionError as error:
        raise ConfigError(f"{source}: it is nested too deep, or contains itself.") from error


def _parsed(text: str, source: str) -> Any:
    root = _compose(text, source)
    around = text if root is None else text[: root.start_mark.index] + text[root.end_mark.index :]
    if "#" in around:
        raise ConfigError(f"{source}: a # at the front or after a blank begins a comment.")
    return None if root is None else _Builder(Document({}, (source,))).build(root, "")


def _compose(text: str, source: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def resolve(self, kind: type[Any], value: Any, implicit: Any) -> str:
            # The meaning of a plain word does not come from PyYAML, for which 1e-3 is text, and `no` is false.
            if kind is yaml.ScalarNode:
                return _PLAIN if implicit[0] else _STR
            return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    loader: Any = None
    try:
        loader = Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        column = "" if mark is None else f", column {mark.column + 1}"
        what = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{SourceLocation(source, line)}{column}: this is no YAML: {what}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: this is no YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Builder:
    """Makes plain data from the parser's nodes."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._repeats = Repeats(document.location(""))

    def build(self, node: Any, full: str) -> Any:
        if node.id == "scalar":
            return self._scalar(node, full)
        self._repeats.count(node, len(node.value))
        if node.id == "sequence":
            self._refuse_tag(node, full, "seq")
            return [self.build(item, below(full, index)) for index, item in enumerate(node.value)]
        self._refuse_tag(node, full, "map")
        own = self._own(node, full)
        mapping: dict[Any, Any] = {}
        for base in reversed(self._bases(node, full)):
            mapping.update(base)
        mapping.update(own)
        return mapping

    def _own(self, node: Any, full: str) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if self._is_merge(key_node):
                continue
            line = key_node.start_mark.line + 1
            location = SourceLocation(self._document.sources[0], line)
            if key_node.id != "scalar":
                raise ConfigError(f"{location}: a key must be text or a whole number, not a list or a mapping.")
            key = self._scalar(key_node, full)
            if not (isinstance(key, str) or is_whole_number(key)):  # to a dict, 1 and true are the same key
                where = f" in {full!r}" if full else ""
                raise ConfigError(
                    f"{location}: the key {key_node.value!r}{where} must be text or a whole number: quote it."
                )
            inner = below(full, key)
            if key in mapping:
                raise ConfigError(f"{location}: {inner!r} is there twice: first in line {lines[key]}.")
            lines[key] = line
            self._document.locations[inner] = location
            mapping[key] = self.build(value_node, inner)
        return mapping

    def _bases(self, node: Any, full: str) -> list[dict[Any, Any]]:
        """The mappings that `<<` names; a key in several of them is taken from the first."""
        bases: list[dict[Any, Any]] = []
        for key_node, value_node in node.value:
            if self._is_merge(key_node):
                built = self.build(value_node, full)
                bases += built if isinstance(built, list) else [built]
                if not all(isinstance(base, dict) for base in bases):
                    raise self._error(value_node, "<< takes a mapping, or a list of mappings")
        return bases

    def _is_merge(self, node: Any) -> bool:
        return bool(node.tag == _PLAIN and node.value == "<<")

    def _scalar(self, node: Any, full: str) -> Any:
        if node.tag == _PLAIN:
            try:
                return bare_value(node.value, nulls=("", "~"))
            except ValueError as error:
                raise self._error(node, f"{full!r}: {error}") from error
        if node.tag not in _TAGGED:
            raise self._error(node, f"the tag {node.tag!r} at {full!r} is not allowed: a configuration is plain data")
        try:
            return _TAGGED[node.tag](node.value)
        except ValueError as error:
            raise self._error(node, f"what is at {full!r} is not what its tag says: {error}") from error

    def _refuse_tag(self, node: Any, full: str, kind: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise self._error(node, f"the tag {node.tag!r} at {full!r} is not allowed: a configuration is plain data")

    def _error(self, node: Any, message: str) -> ConfigError:
        return ConfigError(f"{SourceLocation(self._document.sources[0], node.start_mark.line + 1)}: {message}.")
