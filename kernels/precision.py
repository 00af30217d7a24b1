"""Read and write whether float32 products may be rounded to TensorFloat-32.

PyTorch has two kinds of switches. Reading an old one (`allow_tf32`) raises an error once a program
has used a new one (`fp32_precision`), and writing False to cuDNN's old one makes it inherit from
the new ones above it, which may say "tf32". So both are written, and the new ones are read.
"""

from torch.backends import cuda, cudnn, mkldnn


def allows_tf32() -> bool:
    """Return whether float32 products on CUDA may be TF32."""
    return cuda.matmul.fp32_precision == "tf32"


def set_tf32(allowed: bool) -> None:
    """Let float32 products and convolutions on CUDA be TF32, or not; those on CPUs never are."""
    # The old switches first: writing them changes the new ones.
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    for operation in (cuda.matmul, cudnn.conv, cudnn.rnn):
        operation.fp32_precision = "tf32" if allowed else "ieee"
    for operation in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn):
        operation.fp32_precision = "ieee"
