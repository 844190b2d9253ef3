"""The configuration with which a program works: a tree with attribute and item access, on top of OmegaConf."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dengine.config.limits import refuse_growth
from dengine.config.source_locations import Document, below, plain
from dengine.errors import ConfigError, MissingKeyError

if TYPE_CHECKING:
    from omegaconf import DictConfig, OmegaConf

__all__ = ["Config", "ConfigList", "MissingKeyError", "new_config", "omegaconf", "translated"]

T = TypeVar("T")


class ConfigList(tuple[Any, ...]):
    """A list in a configuration. It cannot be changed in place, and equals a list with the same values."""

    __slots__ = ()
    __hash__ = tuple.__hash__

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, tuple(other) if isinstance(other, list) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class Config(Mapping[Any, Any]):
    """A mapping in a configuration: `cfg.train.lr` and `cfg["train"]["lr"]` are the same.

    The functions of `Conf` make it. `${train.lr}` inside a value is replaced when it is read. A key that is the name of
    a method (`keys`, `values`, `items`, `get`), or that begins with an underscore, is read as an item only.

    Raises (when read):
        MissingKeyError: there is no such key; the message has the full key, the file, and the closest key.
        ConfigError: a `${...}` leads nowhere, or a value is still `???`.

    Cost: about 40 us a look-up; about 1 us after `Conf.freeze`.
    """

    __slots__ = ("_cache", "_document", "_key", "_node")

    _node: "DictConfig"
    _document: Document
    _key: str
    _cache: dict[Any, Any]

    def __init__(self, node: "DictConfig", document: Document, key: str) -> None:
        for name, value in zip(self.__slots__, ({}, document, key, node), strict=True):
            object.__setattr__(self, name, value)

    # -- reading -------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        if key in self._cache:
            return self._cache[key]
        full = below(self._key, key)
        if key not in self._node.keys():  # noqa: SIM118 - `in` is False for what cannot be resolved, too
            raise MissingKeyError(self._missing(key, full))
        value = self._wrapped(translated(lambda: self._node[key], self._document, full), full)
        if omegaconf().is_readonly(self._node):
            self._cache[key] = value
        return value

    def __getattr__(self, name: str) -> Any:
        if name in self._cache:
            return self._cache[name]
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._node.keys())

    def __len__(self) -> int:
        return len(self._node.keys())

    def __contains__(self, key: object) -> bool:
        return key in self._node.keys()  # noqa: SIM118

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(key for key in self if isinstance(key, str))})

    def __repr__(self) -> str:
        return f"Config({omegaconf().to_container(self._node, resolve=False)!r})"

    # -- writing -------------------------------------------------------------------------------------------------

    def __setitem__(self, key: Any, value: Any) -> None:
        full = below(self._key, key)
        if omegaconf().is_readonly(self._node):
            raise ConfigError(
                f"{full!r} cannot be set: this configuration is frozen. "
                "Make another one with Conf.merge(cfg, {...}), and freeze that."
            )
        copy = plain({key: value}, self._key, Document({}, ("the program",)))
        translated(lambda: self._node.__setitem__(key, copy[key]), self._document, full)
        self._document.forget(full)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise ConfigError(f"{name!r} cannot be set as an attribute: write cfg[{name!r}] = ... instead.")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        raise ConfigError(
            f"{below(self._key, name)!r} cannot be deleted: keys of a configuration stay; set it to None."
        )

    def __delitem__(self, key: Any) -> None:
        self.__delattr__(str(key))

    # -- copies --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> tuple[Any, ...]:
        return self._node, self._document, self._key

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        Config.__init__(self, *state)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _wrapped(self, value: Any, full: str) -> Any:
        if omegaconf().is_dict(value):
            return Config(value, self._document, full)
        if omegaconf().is_list(value):
            items = (
                translated(lambda index=index: value[index], self._document, below(full, index))  # type: ignore[misc]
                for index in range(len(value))
            )
            return ConfigList(self._wrapped(item, below(full, index)) for index, item in enumerate(items))
        return value

    def _missing(self, key: Any, full: str) -> str:
        keys = [str(known) for known in self]
        close = difflib.get_close_matches(str(key), keys, n=1)
        hint = f" Did you mean {below(self._key, close[0])!r}?" if close else ""
        have = f"{f'{self._key!r} has' if self._key else 'There are'} {', '.join(keys) or 'no keys'}."
        return f"There is no {full!r} in {self._document.location(self._key)}.{hint} {have}"


def new_config(document: Document) -> Config:
    """The configuration of a document. Raises: ConfigError: its `${...}` would make it too large."""
    refuse_growth(document)
    node = translated(lambda: omegaconf().create(document.data), document, "")
    return Config(node, document, "")


def translated(action: Callable[[], T], document: Document, key: str) -> T:
    """The result of `action`. An error of OmegaConf becomes one that names the key and the file."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        return action()
    except OmegaConfBaseException as error:
        full = str(getattr(error, "full_key", None) or key)
        message = str(error).partition("\n")[0]
        raise ConfigError(f"{document.location(full)}: {full!r} cannot be used: {message}.") from error
    except RecursionError as error:
        raise ConfigError(f"{document.location(key)}: {key!r} is nested too deep, or refers to itself.") from error


def omegaconf() -> "type[OmegaConf]":
    """The class `OmegaConf`, imported when it is used.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from omegaconf import OmegaConf
    except ImportError as error:
        raise ImportError('Conf needs OmegaConf: pip install "dengine[config]".') from error
    return OmegaConf
