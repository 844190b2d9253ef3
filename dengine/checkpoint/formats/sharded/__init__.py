"""The folder that all ranks write: its files, names, plan, reading and verification."""
