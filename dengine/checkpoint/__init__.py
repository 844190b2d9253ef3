"""Checkpoints that can be trusted: whole files and folders or none, proven before they are used.

The parts, for a script of one's own; `dengine.handlers.Checkpoint` is the policy over them.
"""

from dengine.checkpoint.by_hand import save
from dengine.checkpoint.loading import latest, load, verify
from dengine.checkpoint.manifest import Entry
from dengine.checkpoint.partial import LeftOut

__all__ = ["Entry", "LeftOut", "latest", "load", "save", "verify"]
