"""Metrics of other libraries, in the same reduction."""
