"""Implement the operations of a dense block: a specification in PyTorch, and Triton kernels."""
