"""Read datasets from files and archives, and batch them on the training device."""
