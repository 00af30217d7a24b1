"""Read and write files: atomic writes, limits on reading, checkpoints, Lua Torch."""
