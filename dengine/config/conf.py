"""`Conf`: the functions that make configurations, and that work with them."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dengine.checks import path_of
from dengine.config.files import SUFFIXES, read_file
from dengine.config.limits import refuse_growth
from dengine.config.source_locations import Document, SourceLocation, below, plain
from dengine.config.tree import Config, MissingKeyError, new_config, omegaconf, translated
from dengine.config.yaml_text import parse_value
from dengine.errors import ConfigError

__all__ = ["Conf"]


class Conf:
    """Makes configurations (`Config`) from files, dictionaries and command lines.

    Needs OmegaConf: `pip install "dengine[config]"`.

    Example:
        >>> base = Conf.from_dict({"train": {"lr": 0.1, "epochs": 5}, "name": "lr-${train.lr}"})
        >>> cfg = Conf.freeze(Conf.merge(base, Conf.from_cli_dotlist(["train.lr=1e-3"])))
        >>> cfg.train.lr, cfg.name
        (0.001, 'lr-0.001')
        >>> Conf.to_dict(cfg)
        {'train': {'lr': 0.001, 'epochs': 5}, 'name': 'lr-0.001'}
    """

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Config:
        """The configuration in a file, read by its suffix: .yaml (.yml), .toml, .json or .sdn.

        Raises:
            ConfigError: the suffix is unknown, or the content is not one mapping in that format; the message has the
                line and the key.
            OSError: the file cannot be read.
        """
        file = path_of("path", path)
        suffix = file.suffix.lower()
        if suffix not in SUFFIXES:
            raise ConfigError(
                f"{os.fspath(path)}: there is no reader for {suffix or 'a file without a suffix'}; "
                f"there are {', '.join(SUFFIXES)}."
            )
        return new_config(read_file(file, suffix))

    @staticmethod
    def load_sdn(path: str | os.PathLike[str]) -> Config:
        """The configuration in a file of Simple Data Notation, whatever its suffix. Raises: as `load`."""
        return new_config(read_file(path_of("path", path), ".sdn"))

    @staticmethod
    def from_dict(data: Mapping[Any, Any]) -> Config:
        """A configuration with a copy of `data`.

        Raises:
            TypeError: `data` is not a mapping. ConfigError: a configuration cannot hold one of its values; the
                message has the full key.
        """
        return new_config(_from_mapping(data, "from_dict()"))

    @staticmethod
    def from_cli_dotlist(arguments: Sequence[str], *, known: Config | None = None) -> Config:
        """A configuration of arguments such as `train.lr=1e-3`, later ones over earlier ones.

        A value is read as in a YAML file: `true`, `null`, `[1, 2]`, `{a: 1}`, `"quoted text"`; no value at all is null.
        A `#` that would begin a comment in YAML is an error: quote it.

        Args:
            known: the configuration into which the arguments will be merged; a key that it lacks is a typo.

        Raises:
            TypeError: `arguments` is not a list of strings. ConfigError: an argument is not `key=value`, or has a key
                that `known` lacks; the message names it.
        """
        if isinstance(arguments, str) or not all(isinstance(argument, str) for argument in arguments):
            raise TypeError(f"from_cli_dotlist() takes a list such as ['train.lr=1e-3'], but got {arguments!r}.")
        merged = Document({}, ("command line",))
        known_data = None if known is None else _document(known).data
        for argument in arguments:
            given = _from_argument(argument)
            _refuse_clash(merged, given)
            _lay_over(merged.data, given.data)
            merged.locations.update(given.locations)
            if known is not None:
                _check_known(argument, given, known_data, known)
        return new_config(merged)

    @staticmethod
    def merge(*confs: Config | Mapping[Any, Any]) -> Config:
        """A new configuration: mappings are merged key by key, later ones over earlier ones; lists are replaced as a
        whole.

        The arguments are not changed. The result can be changed, even if they are frozen.

        Raises:
            TypeError: there is nothing to merge, or an argument is not a mapping.
            ConfigError: a key has a mapping in one and another value (except null) in another; the message has both.
        """
        if not confs:
            raise TypeError("merge() takes at least one configuration.")
        merged, *others = (_document(conf) for conf in confs)
        for other in others:
            merged = _merged(merged, other)
        return new_config(merged)

    @staticmethod
    def to_dict(cfg: Config) -> dict[Any, Any]:
        """`cfg` as plain dicts and lists, with each `${...}` replaced, as `Track.run(config=...)` and `json` take it.

        Raises:
            TypeError: `cfg` is not a configuration.
            ConfigError: a `${...}` leads nowhere, or a value is still `???`; the message has its full key.
        """
        _check_config(cfg, "to_dict")
        return _resolved(cfg)

    @staticmethod
    def freeze(cfg: Config) -> Config:
        """Replace each `${...}` for good, and refuse changes from now on. `cfg` itself is frozen, and returned.

        Reading a frozen configuration costs a look-up in a dict.

        Raises:
            TypeError: `cfg` is not a configuration. ConfigError: as `to_dict`; `cfg` is then as it was.
        """
        _check_config(cfg, "freeze")
        _resolved(cfg)
        omegaconf().resolve(cfg._node)
        omegaconf().set_readonly(cfg._node, True)
        return cfg


def _check_config(cfg: Any, function: str) -> None:
    if not isinstance(cfg, Config):
        raise TypeError(f"{function}() takes a configuration, as Conf.load() gives it, but got {cfg!r}.")


def _resolved(cfg: Config) -> dict[Any, Any]:
    return translated(lambda: _data_of(cfg._node, resolve=True), cfg._document, cfg._key)


def _data_of(node: object, *, resolve: bool) -> dict[Any, Any]:
    data = omegaconf().to_container(node, resolve=resolve, throw_on_missing=resolve)
    assert isinstance(data, dict)
    return data


def _document(conf: Any) -> Document:
    if not isinstance(conf, Config):
        return _from_mapping(conf, "merge()")
    if conf._key == "":
        data = _data_of(conf._node, resolve=False)
        return Document(data, conf._document.sources, dict(conf._document.locations))
    # A part of a tree: its ${...} may refer to other parts, which are not copied.
    return Document(_resolved(conf), conf._document.sources)


def _from_mapping(data: Any, function: str) -> Document:
    if not isinstance(data, Mapping):
        raise TypeError(f"{function} takes a mapping, but got {data!r}.")
    document = Document({}, ("a dict",))
    try:
        document.data = plain(Conf.to_dict(data) if isinstance(data, Config) else data, "", document)
    except RecursionError as error:
        raise ConfigError("The dict is nested too deep, or contains itself.") from error
    return document


def _from_argument(argument: str) -> Document:
    source = f"the argument {argument if len(argument) <= 200 else f'{argument[:197]}...'!r}"
    name, sign, value = argument.partition("=")
    keys = name.strip().split(".")
    if not sign or not all(keys):
        raise ConfigError(f"{source} is not of the form key=value, such as train.lr=1e-3.")
    document = Document({}, (source,))
    try:
        inner: Any = parse_value(value, source)
    except ConfigError as error:
        raise ConfigError(f"{error} Text with such characters takes quotes: {name}='\"...\"'.") from error
    for key in reversed(keys):
        inner = {key: inner}
    document.data = plain(inner, "", document)
    document.locations = {".".join(keys[: depth + 1]): SourceLocation(source) for depth in range(len(keys))}
    return document


def _lay_over(base: dict[Any, Any], over: dict[Any, Any]) -> None:
    """Merge `over` into `base` in place, so that a thousand arguments do not make a thousand copies."""
    for key, value in over.items():
        below_base = base.get(key)
        if isinstance(below_base, dict) and isinstance(value, dict):
            _lay_over(below_base, value)
        else:
            base[key] = value


def _check_known(argument: str, given: Document, known_data: Any, known: Config) -> None:
    open_pairs: list[tuple[Any, Any, Any]] = [(given.data, known_data, known)]
    while open_pairs:
        new, data, config = open_pairs.pop()
        for key, value in new.items():
            if key not in data:
                raise MissingKeyError(f"The argument {argument!r}: {config._missing(key, below(config._key, key))}")
            if isinstance(value, dict) and isinstance(data[key], dict):  # merge() refuses a mapping and a value
                open_pairs.append((value, data[key], config[key]))


def _merged(base: Document, over: Document) -> Document:
    sources = (*base.sources, *(source for source in over.sources if source not in base.sources))
    both = Document({}, sources, {**base.locations, **over.locations})
    _refuse_clash(base, over)
    refuse_growth(base)
    refuse_growth(over)
    data = translated(lambda: _data_of(omegaconf().merge(base.data, over.data), resolve=False), both, "")
    return Document(data, sources, both.locations)


def _refuse_clash(base: Document, over: Document) -> None:
    """Refuse to merge a mapping and a value: the mapping would silently lose its keys, or there is a typo."""
    open_pairs = [("", base.data, over.data)]
    while open_pairs:
        full, old, new = open_pairs.pop()
        for key in old.keys() & new.keys():
            inner, first, second = below(full, key), old[key], new[key]
            if isinstance(first, dict) and isinstance(second, dict):
                open_pairs.append((inner, first, second))
            elif isinstance(first, dict) != isinstance(second, dict) and not _may_stand_for_both(first, second):
                raise ConfigError(
                    f"{inner!r} is {_kind(first)} in {base.location(inner)}, "
                    f"but {_kind(second)} in {over.location(inner)}: "
                    "a mapping can only be merged with a mapping."
                )


def _may_stand_for_both(*values: Any) -> bool:
    return any(value is None or (isinstance(value, str) and ("${" in value or value == "???")) for value in values)


def _kind(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else f"the value {value!r}"
