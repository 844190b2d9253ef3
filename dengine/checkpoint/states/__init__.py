"""Get plain states from objects, and load them again."""
