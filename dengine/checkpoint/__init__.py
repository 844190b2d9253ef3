"""Checkpoints that can be trusted: files and folders that are complete or not there, and verified before use.

These are the parts, for a script of your own; `dengine.handlers.Checkpoint` is the policy over them.
"""

from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.loading import load, verify
from dengine.checkpoint.resuming import latest
from dengine.checkpoint.saving import save
from dengine.checkpoint.states.partial import LeftOut
from dengine.checkpoint.states.per_rank import PerRank

__all__ = ["Entry", "LeftOut", "PerRank", "latest", "load", "save", "verify"]
