"""What a metric is, and what it takes."""
