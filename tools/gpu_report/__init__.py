"""Measure on a GPU what this project claims about one: `python -m tools.gpu_report`."""
