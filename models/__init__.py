"""Build the networks, and load and rename their weights."""
