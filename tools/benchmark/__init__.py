"""`python -m tools.benchmark`: training speed and memory beside other implementations."""
