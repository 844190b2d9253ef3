"""How a checkpoint is laid out: one file, or a folder that all ranks write."""
