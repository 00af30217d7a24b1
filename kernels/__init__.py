"""The operations of a dense block, in plain PyTorch and in Triton."""
