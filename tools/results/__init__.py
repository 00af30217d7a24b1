"""Read configs, published results and runs, and match runs to configs."""
