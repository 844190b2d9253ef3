"""The version of the package: the one place, from which its metadata are built."""

__version__ = "0.1.0"
