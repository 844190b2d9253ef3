"""Checkpoints that can be trusted: whole files or none, proven before they are used.

The parts, for a script of one's own; `dengine.handlers.Checkpoint` is the policy over them.
"""

from dengine.checkpoint.loading import latest, load, verify
from dengine.checkpoint.manifest import Entry
from dengine.checkpoint.saving import save

__all__ = ["Entry", "latest", "load", "save", "verify"]
