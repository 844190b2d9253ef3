"""Whether something else saves checkpoints of one prefix into one folder at the same time: a job started twice, say."""

import itertools
import os
import socket
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from dengine.checkpoint.catalogue.manifest import Entry
from dengine.errors import CheckpointError

__all__ = ["Rivals"]

_count = itertools.count(1)


class Rivals:
    """What one writer of a folder has seen there, so that it knows another one by what is new.

    Attributes:
        writer: who this one is: host, process, and which of its writers; a checkpoint says it.
    """

    def __init__(self) -> None:
        self._process = f"{socket.gethostname()} {os.getpid()}"
        self.writer = f"{self._process} {next(_count)}"
        self._made_s = time.time()
        self._seen: dict[str, str] = {}  # name -> digest
        self._has_told = False

    def first_look(self, folder: Path, entries: Sequence[Entry]) -> list[Entry]:
        """Those of `entries` that an earlier run has left; not what another process of this host has saved since this
        writer was made. (Clocks of other hosts may differ: what these save is known from the next save on.)"""
        earlier = [entry for entry in entries if not self._is_new(folder, entry)]
        self._seen = {entry.name: entry.sha256 for entry in earlier}
        return earlier

    def check(self, path: Path, entries: Sequence[Entry]) -> None:
        """See who has saved the `entries` in the folder of `path`, which is to be saved now. A warning tells of another
        writer, once.

        Raises:
            CheckpointError: another process has saved `path` while this one was there.
        """
        strange = [entry for entry in entries if self._is_strange(entry)]
        if not strange:
            return
        who = ", ".join(sorted({_shown(entry.writer) for entry in strange}))
        way_out = "Give each job, and each Checkpoint of a job, its own folder or filename_prefix."
        if any(entry.name == path.name and not self._is_of_this_process(entry) for entry in strange):
            raise CheckpointError(f"it was saved meanwhile by another job ({who}), which needs it. {way_out}")
        self._seen.update((entry.name, entry.sha256) for entry in strange)
        if not self._has_told:
            self._has_told = True
            names = ", ".join(entry.name for entry in strange)
            warnings.warn(
                f"Something else ({who}) saves into {path.parent} under the prefix {strange[0].prefix!r}: {names}. "
                f"Each may replace or remove what the other needs. {way_out} This is said once.",
                stacklevel=2,
            )

    def _is_strange(self, entry: Entry) -> bool:
        """By hand, and before writers were noted, there is none."""
        return entry.writer not in ("", self.writer) and self._seen.get(entry.name) != entry.sha256

    def _is_of_this_process(self, entry: Entry) -> bool:
        return entry.writer.rpartition(" ")[0] == self._process

    def _is_new(self, folder: Path, entry: Entry) -> bool:
        host = self._process.partition(" ")[0]
        if entry.writer.partition(" ")[0] != host or self._is_of_this_process(entry):
            return False
        try:
            return os.stat(folder / entry.name).st_mtime > self._made_s
        except OSError:
            return False


def _shown(writer: str) -> str:
    host, _, rest = writer.partition(" ")
    return f"process {rest.partition(' ')[0]} on {host}"
