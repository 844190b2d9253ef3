"""The data of a run: epochs of batches that can start at any position, the same on all ranks."""
