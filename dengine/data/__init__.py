"""Samples over ranks: loaders, samplers, and the seeds of random augmentation."""
