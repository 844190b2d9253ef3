"""The metrics of one engine, which are updated, reduced and saved together."""
