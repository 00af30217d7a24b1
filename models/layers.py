"""Build parts of several networks: convolutions, shortcuts, residual blocks, initial weights."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from models.sync_batchnorm import BatchNorm

EXPANSION = 4  # output channels of a residual bottleneck over those of its 3x3 convolution


class BlockSizes(NamedTuple):
    """Hold channels and stride of a residual block; `width`: channels of its 3x3 convolutions."""

    in_channels: int
    width: int
    out_channels: int
    stride: int


def make_conv(
    in_channels: int, out_channels: int, size: int, stride: int = 1, bias: bool = False
) -> nn.Conv2d:
    """Build a convolution, padded so that H becomes ceil(H / stride); size is odd."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=bias)


class PaddedShortcut(nn.Module):
    """Take every stride-th pixel and append channels of zeros (shortcut A); no parameters."""

    # Parity: Lua appends as many channels of zeros as there are input channels. The first
    # bottleneck needs 4 times the input channels (16 -> 64), so any number can be appended here.

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.pad_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, ceil(H / stride), ceil(W / stride)) from (N, C, H, W)."""
        x = F.avg_pool2d(x, 1, self.stride)  # as in Lua; ncnn has no slices with a step
        return F.pad(x, (0, 0, 0, 0, 0, self.pad_channels))


def make_shortcut(kind: str, sizes: BlockSizes, *, norm: bool) -> nn.Module:
    """Build the shortcut of a residual block (arXiv:1512.03385, section 4.1).

    Args:
        kind: A pads with zeros and B convolves where the number of channels changes; both are the
            identity elsewhere. C convolves in every block.
        norm: put a batch norm after a convolution.
    """
    in_channels, _, out_channels, stride = sizes
    if kind == "C" or (kind == "B" and in_channels != out_channels):
        conv = make_conv(in_channels, out_channels, 1, stride)
        return nn.Sequential(conv, BatchNorm(out_channels)) if norm else conv
    if in_channels != out_channels:
        return PaddedShortcut(in_channels, out_channels, stride)
    return nn.Identity()


def block_sizes(
    counts: tuple[int, ...], width: int, bottleneck: bool, channels: int | None = None
) -> list[list[BlockSizes]]:
    """List the sizes of all residual blocks, stage by stage.

    Each stage but the first begins with stride 2 and has twice the width.

    Args:
        counts: blocks per stage.
        width: channels of the 3x3 convolutions of the first stage.
        bottleneck: blocks have four times as many output channels as `width`.
        channels: of the first stage's input; None: `width`.
    """
    sizes, channels = [], channels or width
    for i, count in enumerate(counts):
        out_channels = EXPANSION * width if bottleneck else width
        first = BlockSizes(channels, width, out_channels, 2 if i > 0 else 1)
        others = [BlockSizes(out_channels, width, out_channels, 1)] * (count - 1)
        sizes.append([first, *others])
        channels, width = out_channels, 2 * width
    return sizes


class GlobalMeanPool(nn.Module):
    """Average over all pixels. What it gets are the maps that a class activation map reads."""

    # Not AdaptiveAvgPool2d: adaptive pooling has no deterministic backward on CUDA.

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C)."""
        return x.mean(dim=(2, 3))


def has_hooks(*modules: nn.Module, inside: bool = True) -> bool:
    """Return whether a call of a module, or with `inside` of one in it, would run a hook."""
    parts = [*modules]
    for part in parts:  # Module.modules() takes three times as long
        if part._forward_hooks or part._forward_pre_hooks:
            return True
        if part._backward_hooks or part._backward_pre_hooks:
            return True
        parts += (each for each in part._modules.values() if inside and each is not None)
    return bool(_has_any_global_hook())


def set_eps(model: nn.Module, eps: float) -> None:
    """Set the epsilon of every batch norm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps


def reset_parameters(model: nn.Module, mode: str = "fan_out") -> None:
    """Initialise convolutions, batch norms and linear layers as Lua does (docs/parity.md).

    Args:
        mode: fan that divides the variance of convolutions. Without batch norms "fan_in" keeps the
            scale of what passes forward; with them it is "fan_out".
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # N(0, sqrt(2 / (kh kw C_out))).
            # Parity: fan-out; torchvision's and timm's DenseNets divide by the fan-in.
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            # Uniform in [-1/sqrt(C_in), 1/sqrt(C_in)], biases 0.
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
