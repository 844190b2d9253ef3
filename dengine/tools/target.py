"""The target of a command: a new file or folder, whole or not there at all."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.tools.arguments import a_path
from dengine.tools.text import say

__all__ = ["add_target", "exit_code_of", "refuse_taken"]


def add_target(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--output", type=a_path, required=True, metavar="TARGET", help=what)


def refuse_taken(target: Path) -> None:
    """
    Raises:
        CheckpointError: `target` exists, and is not empty. OSError: it cannot be looked at.
    """
    if not os.path.lexists(target):
        return
    is_empty = not any(target.iterdir()) if target.is_dir() else target.is_file() and target.stat().st_size == 0
    if not is_empty or target.is_symlink():
        raise CheckpointError(f"{target} exists and is not empty. Nothing is replaced: choose another -o.")


def exit_code_of(action: Callable[[], object]) -> int:
    """Run `action`, and say what it raises: 0 if nothing, 1 for something damaged, 2 for what cannot be done."""
    try:
        action()
    except CorruptCheckpointError as error:
        say(f"CORRUPT: {error}", sys.stderr)
        return 1
    except (CheckpointError, OSError, ValueError) as error:
        say(str(error), sys.stderr)
        return 2
    return 0
