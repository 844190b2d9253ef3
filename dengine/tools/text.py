"""What commands print."""

import sys
from typing import TextIO

from dengine.naming import printable

__all__ = ["say", "size_text"]


def say(text: str, file: TextIO | None = None) -> None:
    """Print text that came from files, without control characters and without what the terminal cannot show."""
    file = sys.stdout if file is None else file
    shown = "\n".join(map(printable, text.split("\n")))
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=file)


def size_text(num_bytes: int) -> str:
    """`num_bytes` with the unit that leaves few digits."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
