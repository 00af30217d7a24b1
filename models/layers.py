"""What several networks are made of: convolutions, shortcuts, initial weights."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from models.sync_batchnorm import BatchNorm

EXPANSION = 4  # a residual bottleneck puts out this many times the maps of its 3x3 convolution


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """(N, C, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """(N, C, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv7x7(in_channels: int, out_channels: int) -> nn.Conv2d:
    """The first convolution of the ImageNet networks: half the size."""
    return nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False)


class PaddedShortcut(nn.Module):
    """Every stride-th pixel, and channels of zeros behind those of the input; no parameters."""

    # Parity: Lua joins the maps with as many zeros, which can only double them. A stage of
    # bottlenecks begins with four times the maps (16 -> 64), so here zeros fill up to any width.

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.pad_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.pad_channels))


def make_shortcut(
    kind: str, in_channels: int, out_channels: int, stride: int, *, norm: bool
) -> nn.Module:
    """What a residual block adds to its branch.

    Args:
        kind: where the number of maps changes A pads with zeros and B convolves, elsewhere both
            are the identity; C convolves in every block (arXiv:1512.03385, section 4.1).
        norm: normalise after a convolution.
    """
    if kind == "C" or (kind == "B" and in_channels != out_channels):
        conv = conv1x1(in_channels, out_channels, stride)
        return nn.Sequential(conv, BatchNorm(out_channels)) if norm else conv
    if in_channels != out_channels:
        return PaddedShortcut(in_channels, out_channels, stride)
    return nn.Identity()


def block_specs(
    counts: tuple[int, ...], width: int, bottleneck: bool
) -> list[list[tuple[int, int, int, int]]]:
    """Stage by stage the channels in, width, channels out and stride of each residual block.

    Each stage but the first begins with stride 2 and has twice the width.

    Args:
        counts: blocks per stage.
        width: of the first stage, and the channels that enter it.
        bottleneck: a block puts out four times its width.
    """
    specs, channels = [], width
    for i, count in enumerate(counts):
        out_channels = EXPANSION * width if bottleneck else width
        stage = [(out_channels, width, out_channels, 1)] * count
        stage[0] = (channels, width, out_channels, 2 if i > 0 else 1)
        specs.append(stage)
        channels, width = out_channels, 2 * width
    return specs


def reset_parameters(model: nn.Module) -> None:
    """Initialise as fb.resnet.torch does (docs/parity.md, rules); `model.classifier` is linear."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # N(0, sqrt(2 / (kh kw C_out))).
            # Parity: fan-out; torchvision's and timm's DenseNets divide by the fan-in.
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    # Weights uniform within 1/sqrt(C_in) of 0, biases 0.
    bound = 1 / math.sqrt(model.classifier.in_features)
    nn.init.uniform_(model.classifier.weight, -bound, bound)
    nn.init.zeros_(model.classifier.bias)
