"""Create the network that the settings describe, with its initial weights."""

from types import SimpleNamespace

import torch
from torch import nn

from distributed.world import BatchShard
from kernels.backend import REFERENCE, Backend
from models.dense_block import DenseBlock, Dropout
from models.layers import set_eps
from models.registry import ARCHITECTURES
from models.sync_batchnorm import BatchNorm


def create(
    opt: SimpleNamespace,
    num_classes: int,
    ops: Backend = REFERENCE,
    shard: BatchShard | None = None,
) -> nn.Module:
    """Create the network that the settings describe, with the initial weights of `manualSeed`.

    Args:
        ops: backend (kernels/backend.py) that computes its dense blocks.
        shard: this process's part of each global batch; None in a single-process run.
    """
    torch.manual_seed(opt.manualSeed)
    architecture = ARCHITECTURES[opt.netType]
    arguments = {name: getattr(opt, flag) for name, flag in architecture.arguments.items()}
    if architecture.uses("kernels"):
        arguments["ops"] = ops
    model = architecture.import_network()(num_classes=num_classes, **arguments)
    set_eps(model, opt.bnEps)
    if shard is not None:
        attach_shard(model, shard, opt.syncBN)
    return model


def attach_shard(model: nn.Module, shard: BatchShard, sync_norms: bool) -> None:
    """Tell modules this process's part of the global batch; with `sync_norms` also batch norms."""
    sharded = (DenseBlock, Dropout, BatchNorm) if sync_norms else (DenseBlock, Dropout)
    for module in model.modules():
        if isinstance(module, sharded):
            module.shard = shard
