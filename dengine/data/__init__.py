"""Data on several ranks: loaders, samplers, and the seeds of random augmentation; sources that are made of others."""

from dengine.data.packing import pack_sequences
from dengine.data.zipped import zip_loaders

__all__ = ["pack_sequences", "zip_loaders"]
