"""Compare training speed and memory with other implementations: `python -m tools.benchmark`."""
