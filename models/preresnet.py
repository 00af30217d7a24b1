"""Pre-activation ResNet (arXiv:1603.05027): BN and ReLU come first.

At ImageNet shape and with basic blocks as in fb.resnet.torch; with bottlenecks at CIFAR shape, the
networks of 164 and 1001 layers, as in their authors' KaimingHe/resnet-1k-layers. The sum of the
shortcuts is never rectified on its way, so that the identity reaches from the first block of a
stage to its last.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import conv1x1, conv3x3, conv7x7, make_shortcut, reset_parameters, residual_plan
from models.sync_batchnorm import BatchNorm

# What of a block sees its input normalised and rectified. The first block of a stage changes the
# number of maps, and begins with that for both its ways; the first of all after a stem that ends
# in BN and ReLU does not need it.
BRANCH, BOTH, NOTHING = "branch", "both", "nothing"


class PreBlock(nn.Module):
    """Two 3x3 convolutions; with bottleneck 1x1 to `width` maps, 3x3, 1x1 to `out_channels`.

    BN and ReLU before each, the first of them as `preact` says; the second convolution has the
    stride with `strides_late`, else the first. Input (N, in_channels, H, W), output
    (N, out_channels, H / stride, W / stride).
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        *,
        shortcut: str,
        bottleneck: bool,
        preact: str,
        strides_late: bool,
    ):
        super().__init__()
        self.bottleneck, self.preact = bottleneck, preact
        first, second = (1, stride) if strides_late else (stride, 1)
        if preact != NOTHING:
            self.bn1 = BatchNorm(in_channels)
        self.conv1 = (conv1x1 if bottleneck else conv3x3)(in_channels, width, first)
        self.bn2 = BatchNorm(width)
        self.conv2 = conv3x3(width, width, second)
        if bottleneck:
            self.bn3 = BatchNorm(width)
            self.conv3 = conv1x1(width, out_channels)
        # Parity: a convolution of a shortcut is not normalised, the next block begins with that.
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        active = x if self.preact == NOTHING else F.relu(self.bn1(x), inplace=True)
        if self.preact == BOTH:
            x = active
        branch = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        if self.bottleneck:
            branch = self.conv3(F.relu(self.bn3(branch), inplace=True))
        return branch.add_(self.downsample(x))


class PreResNet(nn.Module):
    """A pre-activation ResNet for CIFAR (stages of width 16, 32, 64) or ImageNet (64 to 512).

    Args:
        stages: blocks per stage, e.g. (18, 18, 18) for the 164 layers of the CIFAR network.
        num_classes: outputs.
        imagenet_stem: 7x7/2 convolution, BN, ReLU and 3x3/2 max pooling instead of one 3x3
            convolution; stages four times as wide.
        bottleneck: blocks of three convolutions, not of two.
        shortcut: A, B or C, see models/layers.py.

    Input (N, 3, H, W), output logits (N, num_classes).
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        num_classes: int,
        *,
        imagenet_stem: bool = False,
        bottleneck: bool = True,
        shortcut: str = "A",
    ):
        super().__init__()
        width = 64 if imagenet_stem else 16
        self.stem = conv3x3(3, width)
        if imagenet_stem:
            pool = nn.MaxPool2d(3, stride=2, padding=1)
            self.stem = nn.Sequential(conv7x7(3, width), BatchNorm(width), nn.ReLU(True), pool)
        self.stages = nn.Sequential()
        plan = residual_plan(stages, width, bottleneck)
        first = NOTHING if imagenet_stem else BOTH
        # Parity: the 3x3 has the stride in fb.resnet.torch, the first 1x1 in the authors' code.
        strides_late = bottleneck and imagenet_stem
        for stage in plan:
            blocks = nn.Sequential()
            for sizes in stage:
                preact = BRANCH if len(blocks) else first
                block = PreBlock(
                    *sizes,
                    shortcut=shortcut,
                    bottleneck=bottleneck,
                    preact=preact,
                    strides_late=strides_late,
                )
                blocks.append(block)
            self.stages.append(blocks)
            first = BOTH
        _, _, channels, _ = plan[-1][-1]
        self.bn = BatchNorm(channels)
        self.fc = nn.Linear(channels, num_classes)
        reset_parameters(self)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, whatever its name."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        maps = F.relu(self.bn(self.stages(self.stem(images))), inplace=True)
        # A mean, since adaptive pooling has no deterministic backward on CUDA.
        return self.fc(maps.mean(dim=(2, 3)))
