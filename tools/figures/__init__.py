"""`python -m tools.figures`: the paper's figures, drawn from runs."""
