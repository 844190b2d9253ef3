"""Checkpoints: what is collected, how it reaches the disk, and what is kept."""
