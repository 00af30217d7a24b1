"""Provide the parts of a training step: schedule, precision, optimizer, CUDA graphs, memory."""
