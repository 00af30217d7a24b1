"""Manage the run directory, console output and log of a run, and resume it."""
