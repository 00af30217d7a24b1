"""Write the paper's tables with measured results: `python -m tools.report`."""
