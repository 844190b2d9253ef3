"""Arguments of more than one command."""

import argparse
from pathlib import Path

from dengine.checks import path_of

__all__ = ["a_path"]


def a_path(text: str) -> Path:
    """A path; `~` counts where a shell has left it alone, too (as in `--folder=~/runs`)."""
    try:
        return path_of("path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
