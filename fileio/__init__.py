"""Files as bytes: atomic writes, limits on reading, checkpoint and Lua Torch formats."""
