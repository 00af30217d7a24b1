"""Train the configs of a table with several seeds: `python -m tools.sweep`."""
