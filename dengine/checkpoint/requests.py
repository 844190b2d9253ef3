"""What is to be saved, and what became of it: the words between the handler's ranks and its writer."""

from dataclasses import dataclass
from pathlib import Path

from dengine.checkpoint.catalogue.manifest import Entry
from dengine.checkpoint.formats.file import commit, prune, write
from dengine.checkpoint.states.snapshot import States

__all__ = ["Due", "Order", "Report", "write_file"]


@dataclass(frozen=True)
class Report:
    """What rank 0 tells all ranks: what is safe and kept, the last one, and what failed."""

    kept: list[Entry]
    last: Path | None
    failure: str | None = None


@dataclass(frozen=True)
class Due:
    """What is to be saved now. `score` is None where the newest are kept rather than the best."""

    step: int
    score: float | None


@dataclass(frozen=True)
class Order:
    """Where it is saved, what stays beside it, and what goes once it is safe."""

    path: Path
    entry: Entry
    kept: list[Entry]
    dropped: list[Entry]


def write_file(states: States, order: Order) -> Entry:
    """Write, commit, and only then prune. This rank's own.

    Raises:
        Exception: it cannot be written; nothing is changed then.
    """
    entry = commit(*write(states, order.path, order.entry), order.dropped)
    prune(order.path.parent, order.dropped)
    return entry
