"""Provide command lines beside `main.py`: `python -m tools.NAME`."""
