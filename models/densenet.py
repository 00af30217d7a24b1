"""Build a DenseNet (arXiv:1608.06993): stem, dense blocks, transitions, classifier.

Parameters have torchvision's names (`features.denseblock1.denselayer1.norm1.weight`, ...,
`classifier.bias`), so weights are exchanged with torchvision and timm.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterable

from torch import Tensor, nn

from kernels.backend import REFERENCE, Backend
from models import memory_efficient
from models.dense_block import DenseBlock, Dropout, DropoutAvgPool
from models.layers import GlobalMeanPool, has_hooks, make_conv, reset_parameters
from models.sync_batchnorm import BatchNorm


class DenseNet(nn.Module):
    """Compute a DenseNet of any form (basic, B, C or BC), with a stem for CIFAR or ImageNet.

    Args:
        stages: layers per dense block, e.g. (16, 16, 16) for L=100 with bottleneck.
        growth_rate: k, channels that each layer adds.
        init_channels: output channels of the first convolution.
        num_classes: number of outputs.
        in_channels: of the images.
        imagenet_stem: a 7x7/2 convolution, BN, ReLU and 3x3/2 max pooling (paper Table 1) instead
            of a 3x3 convolution.
        bottleneck: put a 1x1 convolution to 4k channels before each 3x3 (DenseNet-B).
        compression: theta, fraction of the channels that a transition keeps (DenseNet-C below 1).
        drop_rate: rate of the dropout after each convolution except the first.
        memory_level: 0 to 4, what dense blocks keep for backward, see models/dense_block.py.
        ops: backend (kernels/backend.py) that computes dense blocks at levels 2 to 4.

    Input (N, in_channels, H, W), output logits (N, num_classes).
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        growth_rate: int,
        init_channels: int,
        num_classes: int,
        *,
        in_channels: int = 3,
        imagenet_stem: bool = False,
        bottleneck: bool = True,
        compression: float = 0.5,
        drop_rate: float = 0.0,
        memory_level: int = 2,
        ops: Backend = REFERENCE,
    ):
        super().__init__()
        channels = init_channels
        if imagenet_stem:
            self.features = Features(_imagenet_stem(in_channels, channels))
        else:  # Parity: no BN or ReLU, since the first dense layer begins with both.
            self.features = Features(OrderedDict(conv0=make_conv(in_channels, channels, 3)))
        for i, num_layers in enumerate(stages, start=1):
            block = DenseBlock(
                num_layers,
                channels,
                growth_rate,
                bottleneck=bottleneck,
                drop_rate=drop_rate,
                memory_level=memory_level,
                ops=ops,
            )
            self.features.add_module(f"denseblock{i}", block)
            channels = block.out_channels
            if i < len(stages):
                transition = Transition(channels, math.floor(compression * channels), drop_rate)
                self.features.add_module(f"transition{i}", transition)
                channels = transition.conv.out_channels
        # Named norm5 for any number of blocks, as in torchvision.
        self.features.add_module("norm5", BatchNorm(channels))
        self.relu5, self.global_pool = nn.ReLU(), GlobalMeanPool()
        self.classifier = nn.Linear(channels, num_classes)
        reset_parameters(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, num_classes), of images, (N, in_channels, H, W)."""
        modules = (self.features, self.relu5, self.global_pool)
        is_ours = [type(each) for each in modules] == [Features, nn.ReLU, GlobalMeanPool]
        if is_ours and len(self.features) > 1 and not has_hooks(self.features, inside=False):
            *others, block, norm = self.features
            if memory_efficient.can_run(block, norm, *modules[1:]):
                x = _run(others, images)
                epilogue = memory_efficient.BlockEpilogue(norm, window=tuple(x.shape[2:]))
                x = memory_efficient.run_dense_block(block, epilogue, x)
                return self.classifier(x.flatten(1))
        return self.classifier(self.global_pool(self.relu5(self.features(images))))


class Features(nn.Sequential):
    """Compute feature maps; where possible, each block and its transition in one function."""

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to (N, C', H', W'), what the last batch norm returns."""
        return _run(self, images)


def _run(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Run modules one after the other, a dense block together with its transition."""
    queue = deque(modules)
    while queue:
        module = queue.popleft()
        if isinstance(module, DenseBlock) and queue and isinstance(queue[0], Transition):
            x = queue.popleft().forward_with_block(module, x)
        else:
            x = module(x)
    return x


def _imagenet_stem(in_channels: int, channels: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        conv0=make_conv(in_channels, channels, 7, stride=2),
        norm0=BatchNorm(channels),
        relu0=nn.ReLU(),
        pool0=nn.MaxPool2d(3, stride=2, padding=1),
    )


class Transition(nn.Sequential):
    """Run BN, ReLU, 1x1 convolution, dropout and 2x2 average pooling between two dense blocks."""

    def __init__(self, in_channels: int, out_channels: int, drop_rate: float):
        drop = {"drop": Dropout(drop_rate)} if drop_rate > 0 else {}
        super().__init__(
            OrderedDict(
                norm=BatchNorm(in_channels),
                relu=nn.ReLU(),
                conv=make_conv(in_channels, out_channels, 1),
                **drop,
                pool=nn.AvgPool2d(2),
            )
        )

    def forward_with_block(self, block: DenseBlock, x: Tensor) -> Tensor:
        """Run a dense block, then this transition; in one function if `can_run` allows it.

        Average pooling and a 1x1 convolution commute, so the pooling runs first, which leaves the
        convolution a quarter of the work. With dropout between the two, the order stays.
        """
        has_dropout = hasattr(self, "drop")
        types = [BatchNorm, nn.ReLU, nn.Conv2d, *[Dropout] * has_dropout, nn.AvgPool2d]
        is_ours = [type(each) for each in self] == types
        if not (is_ours and memory_efficient.can_run(block, self.norm, self)):
            return self(block(x))
        reads = {"conv": self.conv} if has_dropout else {"window": (2, 2)}
        epilogue = memory_efficient.BlockEpilogue(self.norm, **reads)
        x = memory_efficient.run_dense_block(block, epilogue, x)
        return self._dropout_avg_pool(x) if has_dropout else self.conv(x)

    def _dropout_avg_pool(self, x: Tensor) -> Tensor:
        """Return (N, C, H // 2, W // 2), and keep no feature maps for backward."""
        dropout = self.drop.draw(x.device)
        return DropoutAvgPool.apply(x, dropout) if dropout else self.pool(x)
