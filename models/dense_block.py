"""The dense block in plain modules and autograd: the numerical reference.

| memory level | for backward                                                          |
|--------------|-----------------------------------------------------------------------|
| 0            | keeps every concatenation and rectification; grows with depth squared |
| 1            | as 0; ReLU and dropout overwrite their input, fewer buffers in flight |

Every level computes the same function with the same parameters, names and buffers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOTTLENECK_WIDTH = 4  # the 1x1 convolution makes 4k maps (paper, section 3)


class DenseLayer(nn.Module):
    """BN-ReLU-conv3x3, with bottleneck BN-ReLU-conv1x1-BN-ReLU-conv3x3; dropout after each conv.

    Input (N, C, H, W), output the k new maps (N, k, H, W).
    """

    def __init__(
        self, channels: int, growth_rate: int, *, bottleneck: bool, drop_rate: float, inplace: bool
    ):
        super().__init__()
        self.drop_rate = drop_rate
        self.inplace = inplace
        self.bottleneck = bottleneck
        self.norm1 = nn.BatchNorm2d(channels)
        if bottleneck:
            width = BOTTLENECK_WIDTH * growth_rate
            self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, k, H, W)."""
        x = self._drop(self.conv1(F.relu(self.norm1(x), self.inplace)))
        if self.bottleneck:
            x = self._drop(self.conv2(F.relu(self.norm2(x), self.inplace)))
        return x

    def _drop(self, x: Tensor) -> Tensor:
        # Parity: after the 1x1 as well as after the 3x3, which most ports forget.
        if self.drop_rate == 0:
            return x
        return F.dropout(x, self.drop_rate, self.training, self.inplace)


class DenseBlock(nn.ModuleDict):
    """Layers that each see the maps of all before them.

    Input (N, C, H, W), output (N, C + num_layers * growth_rate, H, W): the input, then what each
    layer added.
    """

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
        self.out_channels = channels + num_layers * growth_rate
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                channels + i * growth_rate,
                growth_rate,
                bottleneck=bottleneck,
                drop_rate=drop_rate,
                inplace=memory_level >= 1,
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + num_layers * growth_rate, H, W)."""
        for layer in self.values():
            x = torch.cat([x, layer(x)], dim=1)
        return x
