"""The metrics that come with the package, one family per file."""
