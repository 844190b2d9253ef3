"""Parse what other processes wrote to the store. Malformed content is ignored with one warning.

Anybody who reaches the store's port can write there: a program with a wrong port number, a scanner. See SECURITY.md.
"""

import json
from collections.abc import Mapping
from typing import Any

from dengine.launch.console import say

__all__ = ["has_fields", "parse_numbers", "parse_object", "parse_ranks", "warn_malformed"]

_SHOWN_CHARS = 80
_warned: list[str] = []


def warn_malformed(what: object) -> None:
    """Warn that malformed content of the store was ignored. Only the first call in a process prints."""
    if not _warned:
        _warned.append(str(what))
        say(
            f"dengine: left out what is no message of these ranks: {str(what)[:_SHOWN_CHARS]!r}. Another program may "
            "be writing to the port of their store (MASTER_PORT).\n"
        )


def parse_object(text: bytes) -> dict[str, Any] | None:
    """The JSON object in `text`; None if it holds anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    warn_malformed(text)
    return None


def parse_numbers(text: bytes) -> list[int]:
    """The whole numbers in `text`; anything else in it is ignored."""
    words = text.decode(errors="replace").split()
    numbers = [int(word) for word in words if word.isascii() and word.removeprefix("-").isdigit() and len(word) < 20]
    if len(numbers) < len(words):
        warn_malformed(text)
    return numbers


def parse_ranks(text: bytes, size: int) -> set[int]:
    """The ranks below `size` in `text`; anything else in it is ignored."""
    return {number for number in parse_numbers(text) if 0 <= number < size}


def has_fields(value: Mapping[str, object], **types: type | tuple[type, ...]) -> bool:
    """Whether `value` has entries with these names and types."""
    return all(name in value and isinstance(value[name], kind) for name, kind in types.items())
