"""What a run iterates over: epochs of batches, begun at any position, alike on all ranks."""
