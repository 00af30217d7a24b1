"""Command lines beside `main.py`: `python -m tools.NAME`."""
