"""Talk: the collectives of the package, what only rank 0 runs, and whether all ranks hold the same."""
