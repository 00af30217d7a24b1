"""What the user sees of a run: its directory, console and log, and how it is resumed."""
