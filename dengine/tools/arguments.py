"""Types of arguments that several commands share."""

import argparse
from pathlib import Path

from dengine.checks import path_of

__all__ = ["a_path"]


def a_path(text: str) -> Path:
    """A path, in which `~` is the home folder, also if the shell did not replace it (as in `--folder=~/runs`)."""
    try:
        return path_of("path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
