"""Configs, published results and runs, and which run reproduces which config."""
