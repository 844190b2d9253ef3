"""Data on several ranks: loaders, samplers, and the seeds of random augmentation."""
