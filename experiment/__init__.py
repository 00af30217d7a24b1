"""A run as its user sees it: its directory, console, log, and how it is resumed."""
