"""Handlers: one policy per file, attached to events by the user."""

from dengine.handlers.checkpoint import Checkpoint
from dengine.handlers.early_stopping import EarlyStopping
from dengine.handlers.lr_scheduler import LRScheduler
from dengine.handlers.progress_bar import ProgressBar

__all__ = ["Checkpoint", "EarlyStopping", "LRScheduler", "ProgressBar"]
