"""Messages of a rank on stderr."""

import sys
from contextlib import suppress

__all__ = ["say"]


def say(text: str) -> None:
    """Print `text` on stderr in one write, so that the lines of several ranks do not mix."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
