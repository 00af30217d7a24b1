"""Build ResNets (arXiv:1512.03385), also with stochastic depth (arXiv:1603.09382), pre-activation
ResNets (arXiv:1603.05027) and Wide ResNets (arXiv:1605.07146).

ResNet follows fb.resnet.torch: batch norm after each convolution. Its parameters have torchvision's
names (`conv1.weight`, `layer1.0.bn1.bias`, `layer2.0.downsample.0.weight`, ..., `fc.weight`), so
weights of the ImageNet shape are exchanged with torchvision and timm.

Pre-activation ResNet has BN and ReLU before each convolution, and no ReLU after the sum. At
ImageNet shape and without bottlenecks it follows fb.resnet.torch; with bottlenecks at CIFAR shape
(164 and 1001 layers) its authors' KaimingHe/resnet-1k-layers. A Wide ResNet is one of basic blocks
with more channels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dense_block import Dropout
from models.layers import (
    BlockSizes,
    GlobalMeanPool,
    block_sizes,
    make_conv,
    make_shortcut,
    reset_parameters,
)
from models.sync_batchnorm import BatchNorm

# Which paths of a pre-activation block read its input after BN and ReLU: the residual branch in
# most blocks; the shortcut, too, in a stage's first block, which changes the number of channels;
# none in the first block of all if the stem ends in BN and ReLU.
BRANCH, BOTH, NOTHING = "branch", "both", "nothing"


class Block(nn.Module):
    """Run two 3x3 convolutions, or with `bottleneck` 1x1 to `width` channels, 3x3 and 1x1.

    BN follows each convolution, ReLU all but the last; ReLU also follows the sum with the shortcut.
    The second convolution has the stride if `strides_late`, else the first.

    Attributes:
        survival: with what probability a training step runs the branch; in evaluation its factor.
    """

    survival = 1.0

    def __init__(self, sizes: BlockSizes, *, shortcut: str, bottleneck: bool, strides_late: bool):
        super().__init__()
        self.bottleneck = bottleneck
        for i, conv in enumerate(_convolutions(sizes, bottleneck, strides_late), start=1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", BatchNorm(conv.out_channels))
        self.downsample = make_shortcut(shortcut, sizes, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        # Drawn on the host, which decides what is computed, from the generator that a checkpoint
        # holds and whose state all processes share.
        if self.training and self.survival < 1 and torch.rand(()).item() >= self.survival:
            is_identity = isinstance(self.downsample, nn.Identity)
            return x if is_identity else F.relu(self.downsample(x))  # x is rectified already
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        if self.bottleneck:
            branch = self.bn3(self.conv3(F.relu(branch)))
        if not self.training and self.survival < 1:
            branch = branch * self.survival
        return F.relu(branch + self.downsample(x))


class PreActBlock(nn.Module):
    """Run BN and ReLU before each convolution; `preact`: the paths that start after the first.

    Dropout comes before the second convolution (arXiv:1605.07146, section 2.4).
    """

    def __init__(
        self,
        sizes: BlockSizes,
        *,
        shortcut: str,
        bottleneck: bool,
        strides_late: bool,
        preact: str,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.bottleneck, self.preact = bottleneck, preact
        for i, conv in enumerate(_convolutions(sizes, bottleneck, strides_late), start=1):
            if i > 1 or preact != NOTHING:
                self.add_module(f"bn{i}", BatchNorm(conv.in_channels))
            self.add_module(f"conv{i}", conv)
        # Parity: no batch norm after a shortcut's convolution, the next block begins with one.
        self.downsample = make_shortcut(shortcut, sizes, norm=False)
        self.drop = Dropout(drop_rate) if drop_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        active = x if self.preact == NOTHING else F.relu(self.bn1(x))
        if self.preact == BOTH:
            x = active
        branch = F.relu(self.bn2(self.conv1(active)))
        branch = self.conv2(self.drop(branch))
        if self.bottleneck:
            branch = self.conv3(F.relu(self.bn3(branch)))
        return branch + self.downsample(x)


class ResNet(nn.Module):
    """Compute a ResNet for CIFAR (stages of width 16, 32, 64) or ImageNet (64, 128, 256, 512).

    Args:
        stages: blocks per stage, e.g. (18, 18, 18) for the CIFAR networks of 110 layers, or of 164
            with bottleneck.
        num_classes: number of outputs.
        in_channels: of the images.
        imagenet_stem: a 7x7/2 convolution, BN, ReLU and 3x3/2 max pooling instead of a 3x3
            convolution (with BN and ReLU unless `pre_activation`); stages are four times as wide.
        bottleneck: blocks of three convolutions instead of two.
        shortcut: A, B or C, see models/layers.py.
        pre_activation: BN and ReLU before each convolution instead of after it.
        survival: stochastic depth, P_L: the probability with which a training step runs the last
            block; it falls evenly from the first. Of networks without `pre_activation`.
        widen: multiplies the channels of all stages, not of the stem. With `pre_activation`.
        drop_rate: of the dropout in each block. With `pre_activation`.

    Input (N, in_channels, H, W), output logits (N, num_classes).
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        num_classes: int,
        *,
        in_channels: int = 3,
        imagenet_stem: bool = False,
        bottleneck: bool = False,
        shortcut: str = "A",
        pre_activation: bool = False,
        survival: float = 1.0,
        widen: float = 1.0,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        width = 64 if imagenet_stem else 16
        sizes = block_sizes(stages, round(widen * width), bottleneck, width)
        channels = sizes[-1][-1].out_channels
        # Parity: the 3x3 convolution of a bottleneck has the stride, as in fb.resnet.torch and
        # torchvision. In the papers the first 1x1 has it, and in the code of the pre-activation
        # networks' authors, which the CIFAR shape follows.
        strides_late = bottleneck and (imagenet_stem or not pre_activation)
        options = {"shortcut": shortcut, "bottleneck": bottleneck, "strides_late": strides_late}

        # `forward` runs the modules in the order in which they are set here.
        if pre_activation:
            self.stem = _pre_activated_stem(in_channels, width, imagenet_stem)
            options["drop_rate"] = drop_rate
            self.stages = _pre_activated_stages(sizes, NOTHING if imagenet_stem else BOTH, options)
            self.bn = BatchNorm(channels)
            self.relu = nn.ReLU()
        else:
            size, stride = (7, 2) if imagenet_stem else (3, 1)
            self.conv1 = make_conv(in_channels, width, size, stride)
            self.bn1 = BatchNorm(width)
            self.relu = nn.ReLU()
            if imagenet_stem:
                self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            for i, stage in enumerate(sizes, start=1):
                self.add_module(f"layer{i}", nn.Sequential(*(Block(s, **options) for s in stage)))
        self.global_pool = GlobalMeanPool()
        self.fc = nn.Linear(channels, num_classes)
        reset_parameters(self)
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        for i, block in enumerate(blocks, start=1):  # arXiv:1603.09382, equation 4
            block.survival = 1 - i / len(blocks) * (1 - survival)

    @property
    def classifier(self) -> nn.Linear:
        """Return the last layer, by the name that every network has for it."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, num_classes), of images, (N, in_channels, H, W)."""
        x = images
        for module in self.children():
            x = module(x)
        return x


PreActResNet = partial(ResNet, pre_activation=True)


def _pre_activated_stem(in_channels: int, width: int, imagenet: bool) -> nn.Module:
    # Made for ImageNet, too: it draws random numbers, on which a seed's weights depend.
    small = make_conv(in_channels, width, 3)
    if not imagenet:
        return small
    large, pool = make_conv(in_channels, width, 7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(large, BatchNorm(width), nn.ReLU(), pool)


def _pre_activated_stages(
    sizes: list[list[BlockSizes]], preact: str, options: dict[str, object]
) -> nn.Sequential:
    """Build the stages; `preact` is for the first block of the first stage."""
    stages = nn.Sequential()
    for first, *others in sizes:
        blocks = [PreActBlock(first, **options, preact=preact)]
        blocks += [PreActBlock(other, **options, preact=BRANCH) for other in others]
        stages.append(nn.Sequential(*blocks))
        preact = BOTH
    return stages


def _convolutions(sizes: BlockSizes, bottleneck: bool, strides_late: bool) -> list[nn.Conv2d]:
    """Build the convolutions of a block's residual branch."""
    in_channels, width, out_channels, stride = sizes
    first, second = (1, stride) if strides_late else (stride, 1)
    convs = [
        make_conv(in_channels, width, 1 if bottleneck else 3, first),
        make_conv(width, width, 3, second),
    ]
    return [*convs, make_conv(width, out_channels, 1)] if bottleneck else convs
