"""Build a dense block from standard modules: memory levels 0 and 1 (`--optMemory`).

| memory level | feature maps kept for backward                                                |
|--------------|-------------------------------------------------------------------------------|
| 0            | every concatenation and every ReLU output: quadratic in depth                 |
| 1            | every ReLU output: quadratic in depth; backward recomputes concatenations     |
| 2, 3, 4      | linear in depth: models/memory_efficient.py runs it, with the same parameters |

Every level computes the same function with the same state dict; tests compare all with level 0.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed.world import BatchShard
from kernels.backend import REFERENCE, Backend
from kernels.dropout import DropoutSpec, draw_seed
from kernels.feature_maps import nchw, nhwc
from models.layers import make_conv
from models.sync_batchnorm import BatchNorm, sample_offset

BOTTLENECK_WIDTH = 4  # the 1x1 convolution outputs 4k channels (paper, section 3)


class DenseLayer(nn.Module):
    """Run BN-ReLU-conv3x3, or with `bottleneck` BN-ReLU-conv1x1-BN-ReLU-conv3x3.

    Dropout follows each convolution. Nothing overwrites its input, so that a hook sees what its
    module has returned.
    """

    def __init__(self, channels: int, growth_rate: int, *, bottleneck: bool):
        super().__init__()
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
        """Return the batch norms in execution order, one before each of `convs`."""
        return [self.norm1, self.norm2] if self.bottleneck else [self.norm1]

    @property
    def convs(self) -> list[nn.Conv2d]:
        """Return the convolutions in execution order."""
        return [self.conv1, self.conv2] if self.bottleneck else [self.conv1]

    def forward(self, x: Tensor, dropouts: tuple[DropoutSpec, DropoutSpec] | None = None) -> Tensor:
        """Return k new channels, (N, k, H, W); `dropouts[i]` is applied after convolution i."""
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            x = conv(F.relu(norm(x)))
            # Parity: Lua applies dropout after the 1x1 convolution too; most ports omit it.
            x = apply_dropout(x, dropouts[i] if dropouts else None)
        return x


class DenseBlock(nn.ModuleDict):
    """Run layers `denselayer1`, `denselayer2`, ... on the block's input and all earlier outputs.

    Attributes:
        channels, out_channels: number of input channels, number of output channels.
        width: output channels of each 1x1 convolution; 0 if there is no bottleneck.
        memory_level, ops: how models/memory_efficient.py runs the block.
        shard: this process's part of the global batch; None in a single-process run.
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
        ops: Backend = REFERENCE,
    ):
        super().__init__()
        self.growth_rate, self.drop_rate = growth_rate, drop_rate
        self.memory_level, self.ops = memory_level, ops
        self.channels, self.out_channels = channels, channels + num_layers * growth_rate
        self.width = BOTTLENECK_WIDTH * growth_rate if bottleneck else 0
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                self.layer_offset(i), growth_rate, bottleneck=bottleneck
            )

    @property
    def norms(self) -> list[BatchNorm]:
        """Return the batch norms of all layers in execution order."""
        return [norm for layer in self.values() for norm in layer.norms]

    def layer_offset(self, i: int) -> int:
        """Return C_i, the number of channels that layer i reads; it writes the k after them."""
        return self.channels + i * self.growth_rate

    def draw_seed(self, device: torch.device) -> Tensor | None:
        """Draw this step's dropout seed, (1,) int32; None if no dropout is applied."""
        return draw_seed(device) if self.drop_rate > 0 and self.training else None

    def dropouts(self, seed: Tensor | None, i: int) -> tuple[DropoutSpec, DropoutSpec] | None:
        """Return a DropoutSpec for each convolution of layer i; None if `seed` is None."""
        if seed is None:
            return None
        offset = sample_offset(self.shard)  # index of this process's first image in the batch
        # The layer_id 2 * i + j is unique within the block, so no two dropouts share a mask.
        return tuple(DropoutSpec(self.drop_rate, seed, 2 * i + j, offset) for j in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return input x, (N, C, H, W), and all new channels: (N, C + num_layers * k, H, W)."""
        seed = self.draw_seed(x.device)
        parts = [x]
        for i, layer in enumerate(self.values()):
            x = torch.cat(parts, dim=1)
            # Levels 2 to 4 run as level 1 where models/memory_efficient.py cannot run the block.
            recompute = self.memory_level >= 1 and torch.is_grad_enabled()
            with _recompute_concat(x, tuple(parts)) if recompute else nullcontext():
                parts.append(layer(x, self.dropouts(seed, i)))
        return torch.cat(parts, dim=1)


def _recompute_concat(concat: Tensor, parts: tuple[Tensor, ...]) -> AbstractContextManager:
    """Make autograd keep `parts`, which all later layers share, in place of `concat`."""
    # Recognise `concat` by the address of its storage object: a reference to it would keep it
    # alive, and data_ptr() fails on the FakeTensors of engine/memory.py.
    storage, shape, version = concat.untyped_storage()._cdata, concat.shape, concat._version

    def pack(saved: Tensor) -> Tensor | tuple[Tensor, ...]:
        same = saved.untyped_storage()._cdata == storage and saved.shape == shape
        # A hook may have written into it; it is another tensor then.
        return parts if same and saved._version == version else saved

    def unpack(saved: Tensor | tuple[Tensor, ...]) -> Tensor:
        return torch.cat(saved, dim=1) if isinstance(saved, tuple) else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Dropout(nn.Module):
    """Apply dropout in training; the identity in evaluation. `shard` is as in `DenseBlock`."""

    shard: BatchShard | None = None

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, (N, C, H, W)."""
        return apply_dropout(x, self.draw(x.device))

    def draw(self, device: torch.device) -> DropoutSpec | None:
        """Return this step's dropout, with a new seed; None if no dropout is applied."""
        if not self.training or self.rate == 0:
            return None
        return DropoutSpec(self.rate, draw_seed(device), 0, sample_offset(self.shard))


class DropoutAvgPool(torch.autograd.Function):
    """Apply dropout, then 2x2 average pooling, and keep no feature maps for backward.

    Both are linear in x: backward needs only the mask, which it recomputes from the seed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dropout: DropoutSpec) -> Tensor:
        """Return the pooled maps, (N, C, H // 2, W // 2)."""
        ctx.dropout, ctx.size = dropout, x.shape[2:]
        return F.avg_pool2d(apply_dropout(x, dropout), 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x, (N, C, H, W), and None for the dropout."""
        # Four input pixels get a quarter of each output gradient; an odd last row or column gets 0.
        height, width = (length - length % 2 for length in ctx.size)
        grad = F.interpolate(grad / 4, size=(height, width), mode="nearest")
        grad = F.pad(grad, (0, ctx.size[1] - width, 0, ctx.size[0] - height))
        return apply_dropout(grad, ctx.dropout), None


def apply_dropout(x: Tensor, dropout: DropoutSpec | None) -> Tensor:
    """Multiply x, (N, C, H, W), by the mask, 0 or 1 / (1 - rate); return x if no dropout."""
    if dropout is None:
        return x
    # Masks are defined in the order (N, H, W, C), which is the kernels' layout.
    return x * nchw(dropout.mask(nhwc(x)))
