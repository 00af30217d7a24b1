"""Residual networks: ResNet (arXiv:1512.03385) and pre-activation ResNet (arXiv:1603.05027).

ResNet is as in fb.resnet.torch: batch normalisation after each convolution. Its parameters are
named as in torchvision, so that weights of the ImageNet shape are exchanged by name with
torchvision and timm: `conv1.weight`, `layer1.0.bn1.bias`, `layer2.0.downsample.0.weight`, ...,
`fc.weight`.

With pre-activation BN and ReLU come first: at ImageNet shape and with basic blocks as in
fb.resnet.torch; with bottlenecks at CIFAR shape, the networks of 164 and 1001 layers, as in their
authors' KaimingHe/resnet-1k-layers. The sum of the shortcuts is never rectified on its way, so
that the identity reaches from the first block of a stage to its last.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import block_specs, conv1x1, conv3x3, conv7x7, make_shortcut, reset_parameters
from models.sync_batchnorm import BatchNorm

# What of a pre-activation block sees its input normalised and rectified. The first block of a
# stage changes the number of maps, and begins with that for both its ways; the first of all after a
# stem that ends in BN and ReLU does not need it.
BRANCH, BOTH, NOTHING = "branch", "both", "nothing"


class Block(nn.Module):
    """Two 3x3 convolutions; with bottleneck 1x1 to `width` maps, 3x3, 1x1 to `out_channels`.

    BN after each, ReLU between them and after the sum. The second convolution has the stride with
    `strides_late`, else the first. Input (N, in_channels, H, W), output
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
        strides_late: bool,
    ):
        super().__init__()
        self.bottleneck = bottleneck
        convs = _convolutions(in_channels, width, out_channels, stride, bottleneck, strides_late)
        for i, conv in enumerate(convs, start=1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", BatchNorm(conv.out_channels))
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        branch = F.relu(self.bn1(self.conv1(x)), inplace=True)
        branch = self.bn2(self.conv2(branch))
        if self.bottleneck:
            branch = self.bn3(self.conv3(F.relu(branch, inplace=True)))
        return F.relu(branch.add_(self.downsample(x)), inplace=True)


class PreActBlock(nn.Module):
    """The convolutions of `Block` with BN and ReLU before each, the first of them as `preact` says.

    Input (N, in_channels, H, W), output (N, out_channels, H / stride, W / stride).
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
        strides_late: bool,
        preact: str,
    ):
        super().__init__()
        self.bottleneck, self.preact = bottleneck, preact
        convs = _convolutions(in_channels, width, out_channels, stride, bottleneck, strides_late)
        for i, conv in enumerate(convs, start=1):
            if i > 1 or preact != NOTHING:
                self.add_module(f"bn{i}", BatchNorm(conv.in_channels))
            self.add_module(f"conv{i}", conv)
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


class ResNet(nn.Module):
    """A residual network for CIFAR (stages of width 16, 32, 64) or ImageNet (64, 128, 256, 512).

    Args:
        stages: blocks per stage, e.g. (18, 18, 18) for the CIFAR networks of 110 layers, or of 164
            with bottleneck.
        num_classes: outputs.
        imagenet_stem: 7x7/2 convolution, BN, ReLU and 3x3/2 max pooling instead of one 3x3
            convolution (with BN and ReLU after it, unless pre-activated); stages four times as
            wide.
        bottleneck: blocks of three convolutions, not of two.
        shortcut: A, B or C, see models/layers.py.
        pre_activation: BN and ReLU before each convolution, not after it.

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
        pre_activation: bool = False,
    ):
        super().__init__()
        width = 64 if imagenet_stem else 16
        specs = block_specs(stages, width, bottleneck)
        # Parity: fb.resnet.torch and torchvision; in the papers the first 1x1 has the stride, and
        # in the code of the pre-activated networks' authors, whose CIFAR shape this is.
        strides_late = bottleneck and (imagenet_stem or not pre_activation)
        options = {"shortcut": shortcut, "bottleneck": bottleneck, "strides_late": strides_late}
        # What is defined here runs in this order.
        if pre_activation:
            self.stem = _pre_activated_stem(width, imagenet_stem)
            self.stages = _pre_activated_stages(specs, NOTHING if imagenet_stem else BOTH, options)
            self.bn = BatchNorm(specs[-1][-1][2])
            self.relu = nn.ReLU(inplace=True)
        else:
            self.conv1 = conv7x7(3, width) if imagenet_stem else conv3x3(3, width)
            self.bn1 = BatchNorm(width)
            self.relu = nn.ReLU(inplace=True)
            if imagenet_stem:
                self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            for i, stage in enumerate(specs, start=1):
                blocks = (Block(*sizes, **options) for sizes in stage)
                self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(specs[-1][-1][2], num_classes)
        reset_parameters(self)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, whatever its name."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        *body, classifier = self.children()
        features = images
        for module in body:
            features = module(features)
        # A mean, since adaptive pooling has no deterministic backward on CUDA.
        return classifier(features.mean(dim=(2, 3)))


def _pre_activated_stem(width: int, imagenet: bool) -> nn.Module:
    small = conv3x3(3, width)  # for ImageNet too: a seed's weights depend on all that is drawn
    if not imagenet:
        return small
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(conv7x7(3, width), BatchNorm(width), nn.ReLU(inplace=True), pool)


def _pre_activated_stages(specs: list, preact: str, options: dict[str, object]) -> nn.Sequential:
    """Build the stages, with `preact` in the first block of the first."""
    stages = nn.Sequential()
    for first, *others in specs:
        blocks = [PreActBlock(*first, **options, preact=preact)]
        blocks += [PreActBlock(*sizes, **options, preact=BRANCH) for sizes in others]
        stages.append(nn.Sequential(*blocks))
        preact = BOTH
    return stages


def _convolutions(
    in_channels: int, width: int, out_channels: int, stride: int, bottleneck: bool, late: bool
) -> list[nn.Conv2d]:
    """The convolutions of a block's branch, the second of them with the stride if `late`."""
    first, second = (1, stride) if late else (stride, 1)
    convs = [
        (conv1x1 if bottleneck else conv3x3)(in_channels, width, first),
        conv3x3(width, width, second),
    ]
    return [*convs, conv1x1(width, out_channels)] if bottleneck else convs
