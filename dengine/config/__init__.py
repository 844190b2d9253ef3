"""Configuration: files, dictionaries and command lines, merged into one tree with attribute access."""

from dengine.config.conf import Conf
from dengine.config.tree import Config
from dengine.errors import ConfigError, MissingKeyError

__all__ = ["Conf", "Config", "ConfigError", "MissingKeyError"]
