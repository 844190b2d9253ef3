"""Configuration: files, dictionaries and command lines, merged into one tree with attribute access."""

from dengine.config.conf import Conf
from dengine.config.tree import Config, MissingKeyError
from dengine.errors import ConfigError

__all__ = ["Conf", "Config", "ConfigError", "MissingKeyError"]
