"""From objects to plain states, and back."""
