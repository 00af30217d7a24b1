"""DenseNet (arXiv:1608.06993): stem, dense blocks, transitions, classifier.

Parameters are named as in torchvision, so that weights are exchanged by name with torchvision and
timm: `features.denseblock1.denselayer1.norm1.weight`, ..., `classifier.bias`.
"""

import importlib
import math
from collections import OrderedDict
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import reference
from models import memory_efficient
from models.dense_block import DenseBlock, Dropout, DroppedPool
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
        ops: runs levels 2 to 4: kernels.reference, or another module with the same functions.

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
        ops: ModuleType = reference,
    ):
        super().__init__()
        self.memory_level = memory_level
        self._ops = ops.__name__  # a module itself could be neither copied nor pickled
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
        self.features.add_module("norm5", BatchNorm(channels))  # 5 however many blocks
        self.classifier = nn.Linear(channels, num_classes)
        reset_parameters(self)

    @property
    def ops(self) -> ModuleType:
        """What runs levels 2 to 4."""
        return importlib.import_module(self._ops)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        if self._shares():
            return self.classifier(self._shared_features(images).flatten(1))
        maps = F.relu(self.features(images), inplace=True)  # (N, C, h, w)
        # A mean, since adaptive pooling has no deterministic backward on CUDA.
        return self.classifier(maps.mean(dim=(2, 3)))

    def _shares(self) -> bool:
        """Whether models/memory_efficient.py computes what the plain modules would."""
        if self.memory_level < 2:
            return False
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        alike = len({(norm.eps, norm.momentum, norm.track_running_stats) for norm in norms}) == 1
        if not alike or norms[0].momentum is None or not norms[0].track_running_stats:
            return False
        # A block's mode decides about its dropout.
        blocks = [module for module in self.modules() if isinstance(module, DenseBlock)]
        modes = {module.training for module in (*norms, *blocks)}
        # It has no backward through running statistics, nor through a mixture (frozen layers).
        return modes == {True} or (modes == {False} and not torch.is_grad_enabled())

    def _shared_features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, 1, 1): features, ReLU and mean, stage by stage."""
        x, block = images, None
        for module in self.features.children():
            if isinstance(module, DenseBlock):
                block = module
            elif block is None:
                x = module(x)
            else:
                if isinstance(module, Transition):
                    tail, rest = module.as_tail()
                else:
                    tail, rest = memory_efficient.Tail(module, window=tuple(x.shape[2:])), []
                x = memory_efficient.stage(block, tail, x, self.ops, self.memory_level)
                for part in rest:
                    x = part(x)
                block = None
        return x


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

    def _drop_and_pool(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2), with nothing kept for backward."""
        how = self.drop.draw(x.device)
        return DroppedPool.apply(x, how) if how else self.pool(x)

    def as_tail(self) -> tuple[memory_efficient.Tail, list[nn.Module]]:
        """What of it runs with the dense block before it, and what is left for after that.

        Averages of 2x2 pixels and a 1x1 convolution commute, so that pooling comes first and the
        convolution has a quarter of the work; not with dropout, which sits between the two.
        """
        if hasattr(self, "drop"):
            return memory_efficient.Tail(self.norm, conv=self.conv), [self._drop_and_pool]
        return memory_efficient.Tail(self.norm, window=(2, 2)), [self.conv]
