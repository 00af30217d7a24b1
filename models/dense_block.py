"""The dense block in plain modules and autograd: the numerical reference, memory levels 0 and 1.

| memory level | memory kept for backward                                                    |
|--------------|-----------------------------------------------------------------------------|
| 0            | every concatenation and ReLU output; quadratic in depth                     |
| 1            | as 0, but concatenations are recomputed and ReLU overwrites its input       |
| 2, 3, 4      | linear in depth: models/memory_efficient.py runs the parameters held here   |

Every level computes the same function with the same parameters, names and buffers.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed.world import BatchShard
from kernels.dropout import DropoutSpec, draw_seed
from models.layers import make_conv
from models.sync_batchnorm import BatchNorm, sample_offset

BOTTLENECK_WIDTH = 4  # the 1x1 convolution outputs 4k channels (paper, section 3)


class DenseLayer(nn.Module):
    """BN-ReLU-conv3x3, with bottleneck BN-ReLU-conv1x1-BN-ReLU-conv3x3; dropout after each conv.

    Input (N, C, H, W), output the layer's k new channels, (N, k, H, W).
    """

    def __init__(self, channels: int, growth_rate: int, *, bottleneck: bool, inplace: bool):
        super().__init__()
        self.inplace = inplace
        self.bottleneck = bottleneck
        self.norm1 = BatchNorm(channels)
        if bottleneck:
            width = BOTTLENECK_WIDTH * growth_rate
            self.conv1 = make_conv(channels, width, 1)
            self.norm2 = BatchNorm(width)
            self.conv2 = make_conv(width, growth_rate, 3)
        else:
            self.conv1 = make_conv(channels, growth_rate, 3)

    @property
    def norms(self) -> list[BatchNorm]:
        """Batch norms in the order they run, each followed by one of `convs`."""
        return [self.norm1, self.norm2] if self.bottleneck else [self.norm1]

    @property
    def convs(self) -> list[nn.Conv2d]:
        """Convolutions in the order they run."""
        return [self.conv1, self.conv2] if self.bottleneck else [self.conv1]

    def forward(self, x: Tensor, dropouts: tuple[DropoutSpec, DropoutSpec] | None = None) -> Tensor:
        """(N, C, H, W) -> (N, k, H, W); `dropouts` follow the first and the second convolution."""
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            x = conv(F.relu(norm(x), self.inplace))
            # Parity: dropout after the 1x1 convolution, too, which most ports leave out.
            x = apply_dropout(x, dropouts and dropouts[i], self.inplace)
        return x


class DenseBlock(nn.ModuleDict):
    """Layers, `denselayer1` and on, that each read the output channels of all layers before.

    Input (N, C, H, W), output (N, C + num_layers * growth_rate, H, W): the input, then the new
    channels of each layer.

    Attributes:
        channels, out_channels: of the input and of the output.
        width: channels of each layer's bottleneck; 0 without.
        shard: this replica's part of the batch; None in a single process.
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
                self.layer_offset(i), growth_rate, bottleneck=bottleneck, inplace=memory_level >= 1
            )

    @property
    def norms(self) -> list[BatchNorm]:
        """Batch norms of all layers in the order they run."""
        return [norm for layer in self.values() for norm in layer.norms]

    def layer_offset(self, i: int) -> int:
        """Return the first of the k channels that layer i writes; it reads all channels before."""
        return self.channels + i * self.growth_rate

    def draw_seed(self, device: torch.device) -> Tensor | None:
        """Draw the seed of this step's dropout; None without dropout."""
        return draw_seed(device) if self.drop_rate > 0 and self.training else None

    def dropouts(self, seed: Tensor | None, i: int) -> tuple[DropoutSpec, DropoutSpec] | None:
        """Return the dropouts after the two convolutions of layer i; None without dropout."""
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
    """Make autograd save `parts`, which are saved anyway, where it would save `concat`."""
    # Compare storages: a reference to the tensor would keep it alive, and the fake tensors of
    # engine/memory.py have no data pointer.
    storage, shape = concat.untyped_storage()._cdata, concat.shape

    def pack(saved: Tensor) -> Tensor | tuple[Tensor, ...]:
        same = saved.untyped_storage()._cdata == storage and saved.shape == shape
        return parts if same else saved

    def unpack(saved: Tensor | tuple[Tensor, ...]) -> Tensor:
        return torch.cat(saved, dim=1) if isinstance(saved, tuple) else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Dropout(nn.Module):
    """Dropout in training, (N, C, H, W) -> the same shape; `shard` as in `DenseBlock`."""

    shard: BatchShard | None = None

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return apply_dropout(x, self.draw(x.device), inplace=False)

    def draw(self, device: torch.device) -> DropoutSpec | None:
        """Draw the dropout of this step; None without dropout."""
        if not self.training or self.rate == 0:
            return None
        return DropoutSpec(self.rate, draw_seed(device), 0, sample_offset(self.shard))


class DropoutAvgPool(torch.autograd.Function):
    """Dropout, then 2x2 average pooling, saving no feature maps.

    Both are linear, so backward needs only the dropout mask, which it recomputes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dropout: DropoutSpec) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2)."""
        ctx.dropout, ctx.size = dropout, x.shape[2:]
        return F.avg_pool2d(apply_dropout(x, dropout, inplace=False), 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """(N, C, H // 2, W // 2) -> (N, C, H, W)."""
        # Each output pixel gave a quarter to four input pixels; an odd last row or column got none.
        height, width = (length - length % 2 for length in ctx.size)
        grad = F.interpolate(grad / 4, size=(height, width), mode="nearest")
        grad = F.pad(grad, (0, ctx.size[1] - width, 0, ctx.size[0] - height))
        return apply_dropout(grad, ctx.dropout, inplace=False), None


def apply_dropout(x: Tensor, dropout: DropoutSpec | None, inplace: bool) -> Tensor:
    """Multiply (N, C, H, W) by the mask of a dropout; None leaves it unchanged."""
    if dropout is None:
        return x
    mask = dropout.mask(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x.mul_(mask) if inplace else x * mask
