"""Which checkpoints a folder holds, and which are kept."""
