"""The datasets, from files and archives to batches on the training device."""
