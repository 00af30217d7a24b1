"""Build torchvision's and timm's networks for `python -m tools.benchmark`.

Their parameters have the names of this project's, so that all cases start from the same weights.
"""

from torch import nn

from cli.flag_types import Settings
from models.layers import make_conv, set_eps

REDUCTION = 0.5  # both libraries write it into their transitions


def create(peer: str, opt: Settings) -> nn.Module:
    """Build the network of the settings as a library does, with that library's initial weights.

    Args:
        peer: a member of `cases.PEERS`.

    Raises:
        NotImplementedError: the library is not installed or does not have this network.
    """
    if not opt.bottleneck or opt.reduction != REDUCTION:
        raise NotImplementedError("it has only DenseNet-BC with reduction 0.5")
    if opt.dropRate > 0:
        raise NotImplementedError("its dropout is at other positions")
    if peer == "timm":
        try:
            from timm.models.densenet import DenseNet
        except ImportError:
            raise NotImplementedError("timm is not installed (requirements-dev.txt)") from None
        if opt.initChannels != 2 * opt.growthRate:
            raise NotImplementedError("its first convolution always has 2k channels")
        network = DenseNet(opt.growthRate, opt.stages, opt.nClasses)
    else:
        from torchvision.models import DenseNet

        network = DenseNet(
            opt.growthRate,
            opt.stages,
            opt.initChannels,
            num_classes=opt.nClasses,
            memory_efficient=peer == "torchvision-memory-efficient",
        )
    set_eps(network, opt.bnEps)
    features = network.features
    if opt.nChannels != 3:
        features.conv0 = make_conv(opt.nChannels, opt.initChannels, 7, stride=2)
    if not opt.imagenetShape:  # CIFAR's single 3x3 convolution in place of the stem
        features.conv0 = make_conv(opt.nChannels, opt.initChannels, 3)
        for name in {"norm0", "relu0", "pool0"} & dict(features.named_children()).keys():
            delattr(features, name)  # timm has no relu0: its norm0 includes the ReLU
    return network
