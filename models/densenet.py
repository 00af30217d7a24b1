"""DenseNet (arXiv:1608.06993): stem, dense blocks, transitions, classifier.

Parameters are named as in torchvision, so that weights are exchanged by name with torchvision and
timm: `features.denseblock1.denselayer1.norm1.weight`, ..., `classifier.bias`.
"""

import math
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.backend import REFERENCE, Backend
from models import memory_efficient
from models.dense_block import DenseBlock, Dropout, DropoutAvgPool
from models.layers import conv1x1, conv3x3, conv7x7, reset_parameters
from models.sync_batchnorm import BatchNorm


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
        ops: runs levels 2 to 4.

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
        memory_level: int = 2,
        ops: Backend = REFERENCE,
    ):
        super().__init__()
        self.memory_level, self.ops = memory_level, ops
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
                out_channels = math.floor(compression * channels)
                self.features.add_module(
                    f"transition{i}", Transition(channels, out_channels, drop_rate)
                )
                channels = out_channels
        self.features.add_module("norm5", BatchNorm(channels))  # 5 however many blocks
        self.classifier = nn.Linear(channels, num_classes)
        reset_parameters(self)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        if self.memory_level in memory_efficient.MEMORY_EFFICIENT_LEVELS:
            return self.classifier(self._forward_memory_efficient(images))
        return self.classifier(_relu_mean_pool(self.features(images)))

    def _forward_memory_efficient(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C): features, ReLU and mean, in little memory where that can be."""
        *modules, last = self.features
        x, block = images, None  # a block waits for what reads it: they run together
        for module in modules:
            if block is not None and isinstance(module, Transition):
                x, block = module.forward_with_block(block, x, self.ops, self.memory_level), None
                continue
            if block is not None:
                x, block = block(x), None
            if isinstance(module, DenseBlock):
                block = module
            else:
                x = module(x)
        if block is None:
            return _relu_mean_pool(last(x))
        if not memory_efficient.can_run(block, last):
            return _relu_mean_pool(last(block(x)))
        epilogue = memory_efficient.BlockEpilogue(last, window=tuple(x.shape[2:]))
        return memory_efficient.run_dense_block(
            block, epilogue, x, self.ops, self.memory_level
        ).flatten(1)


def _relu_mean_pool(features: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C): ReLU, which overwrites its input, and mean."""
    # A mean, since adaptive pooling has no deterministic backward on CUDA.
    return F.relu(features, inplace=True).mean(dim=(2, 3))


def _cifar_stem(channels: int) -> OrderedDict[str, nn.Module]:
    # Parity: without BN or ReLU, the first dense layer begins with both.
    return OrderedDict(conv0=conv3x3(3, channels))


def _imagenet_stem(channels: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        conv0=conv7x7(3, channels),
        norm0=BatchNorm(channels),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(3, stride=2, padding=1),
    )


class Transition(nn.Sequential):
    """Between two dense blocks: BN, ReLU, 1x1 convolution, dropout, 2x2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int, drop_rate: float):
        drop = {"drop": Dropout(drop_rate)} if drop_rate > 0 else {}
        super().__init__(
            OrderedDict(
                norm=BatchNorm(in_channels),
                relu=nn.ReLU(inplace=True),
                conv=conv1x1(in_channels, out_channels),
                **drop,
                pool=nn.AvgPool2d(2),
            )
        )

    def forward_with_block(self, block: DenseBlock, x: Tensor, ops: Backend, level: int) -> Tensor:
        """Run a block and this on what it makes, together where that can be.

        Averages of 2x2 pixels and a 1x1 convolution commute, so that pooling comes first and the
        convolution has a quarter of the work; not with dropout, which sits between the two.
        """
        if not memory_efficient.can_run(block, self.norm):
            return self(block(x))
        if hasattr(self, "drop"):
            epilogue = memory_efficient.BlockEpilogue(self.norm, conv=self.conv)
            return self._dropout_avg_pool(
                memory_efficient.run_dense_block(block, epilogue, x, ops, level)
            )
        epilogue = memory_efficient.BlockEpilogue(self.norm, window=(2, 2))
        return self.conv(memory_efficient.run_dense_block(block, epilogue, x, ops, level))

    def _dropout_avg_pool(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2), with nothing kept for backward."""
        dropout = self.drop.draw(x.device)
        return DropoutAvgPool.apply(x, dropout) if dropout else self.pool(x)
