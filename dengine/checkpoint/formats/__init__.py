"""The formats of a checkpoint: one file, or a folder that all ranks write."""
