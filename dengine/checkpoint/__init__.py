"""Checkpoints that can be trusted: whole files and folders or none, proven before they are used.

The parts, for a script of one's own; `dengine.handlers.Checkpoint` is the policy over them.
"""

from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.loading import load, verify
from dengine.checkpoint.resuming import latest
from dengine.checkpoint.saving import save
from dengine.checkpoint.states.partial import LeftOut

__all__ = ["Entry", "LeftOut", "latest", "load", "save", "verify"]
