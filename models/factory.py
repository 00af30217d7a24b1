"""netType -> network, and weights from elsewhere into it. Only this file here sees `opt`."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from distributed.world import Share
from kernels.backend import REFERENCE, Backend
from models.dense_block import DenseBlock, Dropout
from models.densenet import DenseNet
from models.resnet import ResNet
from models.sync_batchnorm import BatchNorm


def _residual(pre_activation: bool) -> Callable[..., nn.Module]:
    """The constructor of a residual network, which has no dense blocks to run."""
    return lambda opt, num_classes, ops: ResNet(
        opt.stages,
        num_classes,
        imagenet_stem=opt.imagenetShape,
        bottleneck=opt.bottleneck,
        shortcut=opt.shortcutType,
        pre_activation=pre_activation,
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
    "resnet": _residual(pre_activation=False),
    "preresnet": _residual(pre_activation=True),
}


def create(
    opt: SimpleNamespace, num_classes: int, ops: Backend = REFERENCE, share: Share | None = None
) -> nn.Module:
    """The network that the settings describe, with the initial weights of `manualSeed`.

    Args:
        ops: what runs its dense blocks.
        share: of the batch, for one of several replicas.
    """
    torch.manual_seed(opt.manualSeed)
    model = NETWORKS[opt.netType](opt, num_classes, ops)
    if share is not None:
        join(model, share, opt.syncBN)
    return model


def join(model: nn.Module, share: Share, sync_norms: bool) -> None:
    """Make a network one of several replicas.

    Args:
        sync_norms: take the moments of the whole batch, not of each replica's images.
    """
    sharing = (DenseBlock, Dropout, BatchNorm) if sync_norms else (DenseBlock, Dropout)
    for module in model.modules():
        if isinstance(module, sharing):
            module.share = share
