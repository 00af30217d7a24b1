"""ResNet (arXiv:1512.03385) as in fb.resnet.torch: batch normalisation after each convolution.

Parameters are named as in torchvision, so that weights of the ImageNet shape are exchanged by name
with torchvision and timm: `conv1.weight`, `layer1.0.bn1.bias`, `layer2.0.downsample.0.weight`, ...,
`fc.weight`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import conv1x1, conv3x3, conv7x7, make_shortcut, reset_parameters, residual_plan
from models.sync_batchnorm import BatchNorm


class Block(nn.Module):
    """Two 3x3 convolutions; with bottleneck 1x1 to `width` maps, 3x3, 1x1 to `out_channels`.

    The first 3x3 has the stride. Input (N, in_channels, H, W), output
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
    ):
        super().__init__()
        self.bottleneck = bottleneck
        # Parity: fb.resnet.torch and torchvision; in the paper the first 1x1 has the stride.
        self.conv1 = (
            conv1x1(in_channels, width) if bottleneck else conv3x3(in_channels, width, stride)
        )
        self.bn1 = BatchNorm(width)
        self.conv2 = conv3x3(width, width, stride if bottleneck else 1)
        self.bn2 = BatchNorm(width)
        if bottleneck:
            self.conv3 = conv1x1(width, out_channels)
            self.bn3 = BatchNorm(out_channels)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        branch = F.relu(self.bn1(self.conv1(x)), inplace=True)
        branch = self.bn2(self.conv2(branch))
        if self.bottleneck:
            branch = self.bn3(self.conv3(F.relu(branch, inplace=True)))
        return F.relu(branch.add_(self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """A ResNet for CIFAR (stages of width 16, 32, 64) or ImageNet (64, 128, 256, 512).

    Args:
        stages: blocks per stage, e.g. (18, 18, 18) for the 110 layers of the CIFAR network.
        num_classes: outputs.
        imagenet_stem: 7x7/2 convolution, BN, ReLU and 3x3/2 max pooling instead of 3x3
            convolution, BN and ReLU; stages four times as wide.
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
        bottleneck: bool = False,
        shortcut: str = "A",
    ):
        super().__init__()
        width = 64 if imagenet_stem else 16
        self.conv1 = conv7x7(3, width) if imagenet_stem else conv3x3(3, width)
        self.bn1 = BatchNorm(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet_stem else nn.Identity()
        plan = residual_plan(stages, width, bottleneck)
        for i, stage in enumerate(plan, start=1):
            blocks = (Block(*sizes, shortcut=shortcut, bottleneck=bottleneck) for sizes in stage)
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.num_stages = len(plan)
        _, _, channels, _ = plan[-1][-1]
        self.fc = nn.Linear(channels, num_classes)
        reset_parameters(self)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, whatever its name."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        maps = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for i in range(1, self.num_stages + 1):
            maps = self.get_submodule(f"layer{i}")(maps)
        # A mean, since adaptive pooling has no deterministic backward on CUDA.
        return self.fc(maps.mean(dim=(2, 3)))
