"""`python -m tools.report`: the paper's tables beside measured results."""
