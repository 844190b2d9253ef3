"""Checkpoints that can be trusted: whole files and folders or none, proven before they are used.

The parts, for a script of one's own; `dengine.handlers.Checkpoint` is the policy over them.
"""

from dengine.checkpoint.by_hand import save
from dengine.checkpoint.loading import latest, load, verify
from dengine.checkpoint.manifest import Entry

__all__ = ["Entry", "latest", "load", "save", "verify"]
