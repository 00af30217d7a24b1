"""Say which products a CPU has instructions for."""

import platform
from functools import cache

import torch


@cache
def computes_in(dtype: torch.dtype) -> bool:
    """Return whether this machine's CPU multiplies numbers of a dtype without converting them."""
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if dtype == torch.bfloat16:
        # Without AVX512-BF16 oneDNN emulates products in bf16.
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        has_instructions = not is_x86 or torch.cpu._is_avx512_bf16_supported()
        return has_instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True
