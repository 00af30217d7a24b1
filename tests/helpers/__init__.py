"""Help several test files."""
