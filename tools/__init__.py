"""Programs beside the training command, run as `python -m tools.NAME`."""
