"""Files with a digest of their content, which threads write and remove."""
