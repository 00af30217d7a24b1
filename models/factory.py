"""netType -> network, and weights from elsewhere into it. Only this file here sees `opt`."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from kernels import reference
from models.densenet import DenseNet
from models.preresnet import PreResNet
from models.resnet import ResNet
from models.sync_batchnorm import Share, join


def _residual(network: type[nn.Module]) -> Callable[..., nn.Module]:
    """The constructor of a residual network, which has no dense blocks to run."""
    return lambda opt, num_classes, ops: network(
        opt.stages,
        num_classes,
        imagenet_stem=opt.imagenetShape,
        bottleneck=opt.bottleneck,
        shortcut=opt.shortcutType,
    )


NETWORKS = {
    "densenet": lambda opt, num_classes, ops: DenseNet(
        opt.stages,
        opt.growthRate,
        opt.initChannels,
        num_classes,
        imagenet_stem=opt.imagenetShape,
        bottleneck=opt.bottleneck,
        compression=opt.reduction,
        drop_rate=opt.dropRate,
        memory_level=opt.optMemory,
        ops=ops,
    ),
    "resnet": _residual(ResNet),
    "preresnet": _residual(PreResNet),
}


def create(
    opt: SimpleNamespace, num_classes: int, ops: ModuleType = reference, share: Share | None = None
) -> nn.Module:
    """The network that the settings describe, with the initial weights of `manualSeed`.

    Args:
        ops: what runs its dense blocks, see kernels/backend.py.
        share: of the batch, for one of several replicas.
    """
    torch.manual_seed(opt.manualSeed)
    model = NETWORKS[opt.netType](opt, num_classes, ops)
    if share is not None:
        join(model, share, opt.syncBN)
    return model
