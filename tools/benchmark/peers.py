"""Other implementations of the same network, for `python -m tools.benchmark`.

Their parameters have the names of ours, so that every case starts from the same weights.
"""

from torch import nn

from cli.flag_types import Settings

PEERS = ("torchvision", "torchvision-memory-efficient", "timm")
THEIR_REDUCTION = 0.5  # both libraries write it into their transitions


class Unsupported(Exception):
    """Why a case cannot take part."""


def create(implementation: str, opt: Settings, num_classes: int) -> nn.Module:
    """The network of the settings by a member of `PEERS`, with that library's initial weights.

    Raises:
        Unsupported: the library is not installed or does not have this network.
    """
    if opt.netType != "densenet" or not opt.bottleneck or opt.reduction != THEIR_REDUCTION:
        raise Unsupported("it has only DenseNet-BC with reduction 0.5")
    if opt.dropRate > 0:
        raise Unsupported("its dropout sits in other places")
    if implementation == "timm":
        network = _timm(opt, num_classes)
    else:
        from torchvision.models import DenseNet

        network = DenseNet(
            opt.growthRate,
            opt.stages,
            opt.initChannels,
            num_classes=num_classes,
            memory_efficient=implementation == "torchvision-memory-efficient",
        )
    if not opt.imagenetShape:
        _give_cifar_stem(network.features, opt.initChannels)
    return network


def _timm(opt: Settings, num_classes: int) -> nn.Module:
    try:
        from timm.models.densenet import DenseNet
    except ImportError:
        raise Unsupported("timm is not installed (requirements-dev.txt)") from None
    if opt.initChannels != 2 * opt.growthRate:
        raise Unsupported("its first convolution always has 2k maps")
    return DenseNet(opt.growthRate, opt.stages, num_classes)


def _give_cifar_stem(features: nn.Sequential, channels: int) -> None:
    """Replace the ImageNet stem by one 3x3 convolution, as in models/densenet.py."""
    features.conv0 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        if hasattr(features, name):  # timm's norm0 includes the ReLU
            delattr(features, name)
