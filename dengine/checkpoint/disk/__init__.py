"""Files and folders that are complete or absent, and prove what they hold."""
