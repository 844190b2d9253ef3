"""Adapters, so that metrics of other libraries take part in the same reduction."""
