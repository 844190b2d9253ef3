"""Files that prove what they hold, written and removed in threads of their own."""
