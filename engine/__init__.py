"""The parts of a training step: schedule, precision, optimizer, gradients, CUDA graphs, memory."""
