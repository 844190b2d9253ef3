"""The catalogue of a folder: the checkpoints in it, and those to keep."""
