"""Build the 19-layer Highway Network of arXiv:1507.06228 that its authors' Caffe files describe."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.dense_block import Dropout
from models.layers import GlobalMeanPool, make_conv, reset_parameters

# Channels of each stage, and its layers: a plain one, which changes the number of channels, first.
STAGES = ((32, 5), (80, 6), (128, 6))
LAST_CHANNELS = 100  # of the 1x1 convolution before the classifier
GATE_BIAS = -2.0  # a network begins with gates that let most of the input pass (section 2.2)


class HighwayLayer(nn.Module):
    """Compute H(x) T(x) + x (1 - T(x)): H a convolution and ReLU, T one and a sigmoid (eq. 3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = make_conv(channels, channels, 3, bias=True)
        self.gate = make_conv(channels, channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, (N, C, H, W)."""
        return x.lerp(F.relu(self.conv(x)), self.gate(x).sigmoid())


class HighwayNet(nn.Module):
    """Compute the network, with 2x2 max pooling between its stages.

    Args:
        num_classes: number of outputs.
        in_channels: of the images.
        drop_rate: of the images, after each pooling and before the classifier.
        widen: multiplies the channels.

    Input (N, in_channels, H, W), output logits (N, num_classes).
    """

    def __init__(
        self, num_classes: int, *, in_channels: int = 3, drop_rate: float = 0.2, widen: float = 1.0
    ):
        super().__init__()
        self.features = nn.Sequential(Dropout(drop_rate))
        channels = in_channels
        for i, (width, num_layers) in enumerate(STAGES):
            if i:
                self.features.extend([nn.MaxPool2d(2), Dropout(drop_rate)])
            width = round(widen * width)
            self.features.extend([make_conv(channels, width, 3, bias=True), nn.ReLU()])
            self.features.extend(HighwayLayer(width) for _ in range(num_layers - 1))
            channels = width
        last = round(widen * LAST_CHANNELS)
        self.features.extend([make_conv(channels, last, 1, bias=True), nn.ReLU()])
        self.global_pool, self.drop = GlobalMeanPool(), Dropout(drop_rate)
        self.classifier = nn.Linear(last, num_classes)
        reset_parameters(self, mode="fan_in")
        for module in self.modules():
            if isinstance(module, HighwayLayer):
                nn.init.constant_(module.gate.bias, GATE_BIAS)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, num_classes), of images, (N, in_channels, H, W)."""
        means = self.global_pool(self.features(images))
        return self.classifier(self.drop(means[..., None, None]).flatten(1))
