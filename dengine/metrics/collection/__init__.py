"""The metrics of one engine: updated, reduced and saved together."""
