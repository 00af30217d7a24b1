"""The dense block in plain modules and autograd: the numerical reference.

| memory level | for backward                                                          |
|--------------|-----------------------------------------------------------------------|
| 0            | keeps every concatenation and rectification; grows with depth squared |
| 1            | as 0; concatenations are made anew, ReLU overwrites its input         |
| 2, 3, 4      | linear in depth: models/memory_efficient.py runs the same modules         |

Every level computes the same function with the same parameters, names and buffers.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed.world import BatchShard
from kernels.dropout import DropoutSpec, draw_seed
from models.sync_batchnorm import BatchNorm, sample_offset

BOTTLENECK_WIDTH = 4  # the 1x1 convolution makes 4k maps (paper, section 3)


class DenseLayer(nn.Module):
    """BN-ReLU-conv3x3, with bottleneck BN-ReLU-conv1x1-BN-ReLU-conv3x3; dropout after each conv.

    Input (N, C, H, W), output the k new maps (N, k, H, W).
    """

    def __init__(self, channels: int, growth_rate: int, *, bottleneck: bool, inplace: bool):
        super().__init__()
        self.inplace = inplace
        self.bottleneck = bottleneck
        self.norm1 = BatchNorm(channels)
        if bottleneck:
            width = BOTTLENECK_WIDTH * growth_rate
            self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
            self.norm2 = BatchNorm(width)
            self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, growth_rate, 3, padding=1, bias=False)

    @property
    def norms(self) -> list[BatchNorm]:
        """The batch normalisations in the order they run."""
        return [self.norm1, self.norm2] if self.bottleneck else [self.norm1]

    def forward(self, x: Tensor, dropouts: tuple[DropoutSpec, DropoutSpec] | None = None) -> Tensor:
        """(N, C, H, W) -> (N, k, H, W); `dropouts` after the first and the second convolution."""
        # Parity: after the 1x1 as well as after the 3x3, which most ports forget.
        x = self.conv1(F.relu(self.norm1(x), self.inplace))
        x = apply_dropout(x, dropouts and dropouts[0], self.inplace)
        if self.bottleneck:
            x = self.conv2(F.relu(self.norm2(x), self.inplace))
            x = apply_dropout(x, dropouts and dropouts[1], self.inplace)
        return x


class DenseBlock(nn.ModuleDict):
    """Layers that each see the maps of all before them.

    Input (N, C, H, W), output (N, C + num_layers * growth_rate, H, W): the input, then what each
    layer added.

    Attributes:
        channels, out_channels: maps of the input and of the output.
        width: maps of each layer's bottleneck; 0 without.
        shard: this replica's part of the batch; None for one replica.
    """

    shard: BatchShard | None = None

    def __init__(
        self,
        num_layers: int,
        channels: int,
        growth_rate: int,
        *,
        bottleneck: bool,
        drop_rate: float,
        memory_level: int,
    ):
        super().__init__()
        self.growth_rate, self.drop_rate = growth_rate, drop_rate
        self.recomputes_concat = memory_level >= 1
        self.channels, self.out_channels = channels, channels + num_layers * growth_rate
        self.width = BOTTLENECK_WIDTH * growth_rate if bottleneck else 0
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                self.layer_offset(i),
                growth_rate,
                bottleneck=bottleneck,
                inplace=memory_level >= 1,
            )

    @property
    def norms(self) -> list[BatchNorm]:
        """The batch normalisations in the order they run."""
        return [norm for layer in self.values() for norm in layer.norms]

    def layer_offset(self, i: int) -> int:
        """The first channel that layer i writes: it reads those before."""
        return self.channels + i * self.growth_rate

    def draw_seed(self, device: torch.device) -> Tensor | None:
        """The seed of this step's dropout; None where nothing is dropped."""
        return draw_seed(device) if self.drop_rate > 0 and self.training else None

    def dropouts(self, seed: Tensor | None, i: int) -> tuple[DropoutSpec, DropoutSpec] | None:
        """The dropouts after the two convolutions of layer i."""
        if seed is None:
            return None
        offset = sample_offset(self.shard)
        return tuple(DropoutSpec(self.drop_rate, seed, 2 * i + j, offset) for j in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + num_layers * growth_rate, H, W)."""
        seed = self.draw_seed(x.device)
        parts = [x]
        for i, layer in enumerate(self.values()):
            x = torch.cat(parts, dim=1)
            with _recompute_concat(x, tuple(parts)) if self.recomputes_concat else nullcontext():
                parts.append(layer(x, self.dropouts(seed, i)))
        return torch.cat(parts, dim=1)


def _recompute_concat(concat: Tensor, parts: tuple[Tensor, ...]) -> AbstractContextManager:
    """Let operations that keep `concat` for backward keep its parts, which are there anyway."""
    # Not the tensor, which would be kept; its storage: fake tensors have it too (engine/memory.py).
    storage, shape = concat.untyped_storage()._cdata, concat.shape

    def pack(saved: Tensor) -> Tensor | tuple[Tensor, ...]:
        same = saved.untyped_storage()._cdata == storage and saved.shape == shape
        return parts if same else saved

    def unpack(saved: Tensor | tuple[Tensor, ...]) -> Tensor:
        return torch.cat(saved, dim=1) if isinstance(saved, tuple) else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Dropout(nn.Module):
    """Dropout of a tensor (N, C, H, W) in training; `shard` as in `DenseBlock`."""

    shard: BatchShard | None = None

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Any (N, C, H, W) -> the same shape."""
        return apply_dropout(x, self.draw(x.device), inplace=False)

    def draw(self, device: torch.device) -> DropoutSpec | None:
        """The dropout of this step; None where nothing is dropped."""
        if not self.training or self.rate == 0:
            return None
        return DropoutSpec(self.rate, draw_seed(device), 0, sample_offset(self.shard))


class DropoutAvgPool(torch.autograd.Function):
    """Average over 2x2 pixels of what a dropout leaves of (N, C, H, W).

    Both are linear: backward needs the mask, which it computes again, and no values.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dropout: DropoutSpec) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2)."""
        ctx.dropout, ctx.size = dropout, x.shape[2:]
        return F.avg_pool2d(apply_dropout(x, dropout, inplace=False), 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """(N, C, H // 2, W // 2) -> (N, C, H, W)."""
        height, width = (length - length % 2 for length in ctx.size)
        grad = F.interpolate(grad / 4, size=(height, width), mode="nearest")
        grad = F.pad(grad, (0, ctx.size[1] - width, 0, ctx.size[0] - height))
        return apply_dropout(grad, ctx.dropout, inplace=False), None


def apply_dropout(x: Tensor, dropout: DropoutSpec | None, inplace: bool) -> Tensor:
    """Apply a dropout, or none, to (N, C, H, W)."""
    if dropout is None:
        return x
    mask = dropout.mask(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x.mul_(mask) if inplace else x * mask
