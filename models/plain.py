"""Build Network in Network, All-CNN and Deeply-Supervised Nets: convolutions without batch norm.

Each classifies every pixel of its last feature maps with one linear layer, and averages the scores.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dense_block import Dropout
from models.layers import GlobalMeanPool, make_conv, reset_parameters

# Of each mlpconv layer: size of its first convolution; channels of it and of the 1x1 ones.
NIN_LAYERS = ((5, (192, 160, 96)), (5, (192, 192, 192)), (3, (192, 192)))
NIN_LAYERS_SVHN = ((5, (128, 96, 64)), (5, (320, 256, 128)), (5, (384, 256)))
ALL_CNN_CHANNELS = (96, 192)
COMPANION_RATE = 1e-3  # learning rate of DSN's companions over that of its body (authors' files)
INITIAL_STD = 0.05  # of NIN's weights (authors' files); of fewer channels more, for equal scale
IMAGE_DROP_SHARE = 0.4  # All-CNN drops 20 % of the images and 50 % of feature maps


def convolution(in_channels: int, out_channels: int, size: int, **options) -> Iterator[nn.Module]:
    """Yield a convolution and its ReLU."""
    yield make_conv(in_channels, out_channels, size, **options, bias=True)
    yield nn.ReLU()


class PixelClassifier(nn.Module):
    """Classify each pixel of some feature maps, and average the scores of all pixels.

    Args:
        features: maps images to feature maps.
        channels: of these.
        rectified: put a ReLU on the scores, as the papers' files do.
    """

    def __init__(
        self, features: nn.Module, channels: int, num_classes: int, rectified: bool = True
    ):
        super().__init__()
        self.features, self.rectified = features, rectified
        self.classifier = nn.Linear(channels, num_classes)
        self.global_pool = GlobalMeanPool()
        reset_parameters(self, mode="fan_in")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, num_classes), of images, (N, in_channels, H, W)."""
        return self.classify(self.features(images))

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits, (N, num_classes), of feature maps, (N, C, H, W)."""
        scores = self.classifier(features.permute(0, 2, 3, 1))
        scores = (F.relu(scores) if self.rectified else scores).permute(0, 3, 1, 2)
        return self.global_pool(scores)


class NIN(PixelClassifier):
    """Compute Network in Network (arXiv:1312.4400): three mlpconv layers.

    An mlpconv layer is a convolution and 1x1 convolutions, a ReLU after each. 3x3/2 max pooling and
    dropout follow the first two. The last 1x1 convolution is the classifier.

    Args:
        num_classes: number of outputs.
        in_channels: of the images.
        drop_rate: of the dropout.
        widen: multiplies the channels.
        rectified: put a ReLU on the scores.
        layers: the convolutions, like NIN_LAYERS.

    Input (N, in_channels, H, W), output logits (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        drop_rate: float = 0.5,
        widen: float = 1.0,
        rectified: bool = True,
        layers: tuple[tuple[int, tuple[int, ...]], ...] = NIN_LAYERS,
    ):
        features, channels = nn.Sequential(), in_channels
        for i, (size, widths) in enumerate(layers):
            if i:  # 32, 16 and 8 pixels
                features.extend([nn.MaxPool2d(3, stride=2, ceil_mode=True), Dropout(drop_rate)])
            for width in (round(widen * width) for width in widths):
                features.extend(convolution(channels, width, size))
                channels, size = width, 1
        super().__init__(features, channels, num_classes, rectified)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD / widen**0.5)


NINForSVHN = partial(NIN, layers=NIN_LAYERS_SVHN)


class Companion(nn.Linear):
    """Classify images by all values of their feature maps, (N, C, H, W), and learn slowly.

    Its weights are `scale` times its parameters, so that their gradients move them scale^2 times as
    fast. Weight decay shrinks them as fast as those of the body.
    """

    scale = COMPANION_RATE**0.5

    def reset_parameters(self) -> None:
        """Draw the weights uniformly from +-1/sqrt(in_features); biases are 0."""
        bound = self.in_features**-0.5 / self.scale
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, (N, num_classes)."""
        return self.scale * super().forward(features.flatten(1))


class DSN(NIN):
    """Compute a Deeply-Supervised Net (arXiv:1409.5185): NIN with a classifier of each layer.

    In training it returns the logits, and those of a companion classifier of the output of each
    mlpconv layer's first convolution, before its ReLU: [(logits, weight), ...]. The weight of the
    companions' losses falls evenly to 0 over training (section 2).

    Args:
        num_classes: number of outputs.
        image_size: height and width in pixels.
        aux_weight: weight of the companions' losses at the beginning.
        options: further arguments of NIN.

    Attributes:
        progress: fraction of the epochs that are done; the trainer sets it.

    Input (N, in_channels, image_size, image_size).
    """

    def __init__(self, num_classes: int, *, image_size: int, aux_weight: float = 0.1, **options):
        # A hinge loss needs scores of both signs.
        super().__init__(num_classes, **options, rectified=False)
        self.aux_weight = aux_weight
        self.register_buffer("progress", torch.zeros(()), persistent=False)
        self.companions = nn.ModuleList()
        for conv in self._supervised_convolutions():
            num_values = conv.out_channels * image_size**2
            self.companions.append(Companion(num_values, num_classes))
            image_size = -(-(image_size - 3) // 2) + 1  # as the pooling rounds

    def _supervised_convolutions(self) -> list[nn.Conv2d]:
        convs = [module for module in self.features if isinstance(module, nn.Conv2d)]
        return [conv for conv in convs if conv.kernel_size > (1, 1)]

    def forward(self, images: Tensor) -> Tensor | list[tuple[Tensor, float | Tensor]]:
        """Return the logits, (N, num_classes), in training those of all classifiers."""
        if not self.training:
            return super().forward(images)
        outputs: list[Tensor] = []
        with ExitStack() as hooks:  # are removed at the end
            for conv in self._supervised_convolutions():
                hook = conv.register_forward_hook(lambda *call: outputs.append(call[-1]))
                hooks.enter_context(hook)
            features = self.features(images)
        weight = self.aux_weight * (1 - self.progress)
        heads = zip(self.companions, outputs, strict=True)
        own = self.classify(features), 1
        return [own, *((companion(output), weight) for companion, output in heads)]


class AllCNN(PixelClassifier):
    """Compute All-CNN-C (arXiv:1412.6806): convolutions with stride 2 in place of pooling.

    Args:
        num_classes: number of outputs.
        in_channels: of the images.
        drop_rate: of the dropout after each convolution with stride 2; 0.4 times that of images.
        widen: multiplies the channels.

    Input (N, in_channels, H, W) of at least 9 pixels, output logits (N, num_classes).
    """

    def __init__(
        self, num_classes: int, *, in_channels: int = 3, drop_rate: float = 0.5, widen: float = 1.0
    ):
        features, channels = nn.Sequential(Dropout(IMAGE_DROP_SHARE * drop_rate)), in_channels
        for width in (round(widen * width) for width in ALL_CNN_CHANNELS):
            for stride in (1, 1, 2):
                features.extend(convolution(channels, width, 3, stride=stride))
                channels = width
            features.append(Dropout(drop_rate))
        features.extend([*convolution(channels, channels, 3), *convolution(channels, channels, 1)])
        features[-4].padding = (0, 0)  # 8 pixels become 6
        super().__init__(features, channels, num_classes)
