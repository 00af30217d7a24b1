"""DenseNet (arXiv:1608.06993): stem, dense blocks, transitions, classifier.

Parameters are named as in torchvision, so that weights are exchanged by name with torchvision and
timm: `features.denseblock1.denselayer1.norm1.weight`, ..., `classifier.bias`.
"""

import math
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from models.dense_block import DenseBlock


class DenseNet(nn.Module):
    """A DenseNet in any of its forms: basic, B, C or BC; for CIFAR or for ImageNet sized images.

    Args:
        stages: layers per dense block, e.g. (16, 16, 16) for L=100 with bottleneck.
        growth_rate: k, feature maps that each layer adds.
        init_channels: feature maps of the first convolution.
        num_classes: outputs.
        imagenet_stem: 7x7/2 convolution, BN, ReLU and 3x3/2 max pooling (paper Table 1) instead of
            one 3x3 convolution.
        bottleneck: put a 1x1 convolution to 4k maps before each 3x3 (DenseNet-B).
        compression: theta, share of the maps that a transition keeps (DenseNet-C below 1).
        drop_rate: dropout after each convolution except the first.
        memory_level: what a dense block keeps for backward, see models/dense_block.py.

    Input (N, 3, H, W), output logits (N, num_classes).
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        growth_rate: int,
        init_channels: int,
        num_classes: int,
        *,
        imagenet_stem: bool = False,
        bottleneck: bool = True,
        compression: float = 0.5,
        drop_rate: float = 0.0,
        memory_level: int = 1,
    ):
        super().__init__()
        channels = init_channels
        stem = _imagenet_stem if imagenet_stem else _cifar_stem
        self.features = nn.Sequential(stem(channels))
        for i, num_layers in enumerate(stages, start=1):
            block = DenseBlock(
                num_layers,
                channels,
                growth_rate,
                bottleneck=bottleneck,
                drop_rate=drop_rate,
                memory_level=memory_level,
            )
            self.features.add_module(f"denseblock{i}", block)
            channels = block.out_channels
            if i < len(stages):
                kept = math.floor(compression * channels)
                self.features.add_module(f"transition{i}", Transition(channels, kept, drop_rate))
                channels = kept
        self.features.add_module("norm5", nn.BatchNorm2d(channels))  # 5 however many blocks
        self.classifier = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as fb.resnet.torch does (docs/parity.md, rules)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # N(0, sqrt(2 / (kh kw C_out))).
                # Parity: fan-out; torchvision and timm divide by the fan-in.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        self.reset_classifier()

    def reset_classifier(self) -> None:
        """Weights uniform within 1/sqrt(C_in) of 0, biases 0."""
        bound = 1 / math.sqrt(self.classifier.in_features)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        maps = F.relu(self.features(images), inplace=True)  # (N, C, h, w)
        # A mean, since adaptive pooling has no deterministic backward on CUDA.
        return self.classifier(maps.mean(dim=(2, 3)))


def _cifar_stem(channels: int) -> OrderedDict[str, nn.Module]:
    # Parity: without BN or ReLU, the first dense layer begins with both.
    return OrderedDict(conv0=nn.Conv2d(3, channels, 3, padding=1, bias=False))


def _imagenet_stem(channels: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        conv0=nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(channels),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(3, stride=2, padding=1),
    )


class Transition(nn.Sequential):
    """Between two dense blocks: BN, ReLU, 1x1 convolution, dropout, 2x2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int, drop_rate: float):
        drop = {"drop": nn.Dropout(drop_rate)} if drop_rate > 0 else {}
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(in_channels),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
                **drop,
                pool=nn.AvgPool2d(2),
            )
        )
