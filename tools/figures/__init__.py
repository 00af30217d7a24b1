"""Draw the paper's figures from runs: `python -m tools.figures`."""
