"""Communication: the collectives, functions that only rank 0 runs, and checks that all ranks agree."""
