"""`python -m tools.sweep`: train the configs of a table with several seeds."""
