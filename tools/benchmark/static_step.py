"""Record the launches of a training step on tensors without memory: no GPU is needed."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models.factory
from cli.flag_types import Settings
from engine.precision import autocast
from kernels import triton_ops  # noqa: TID251
from kernels.backend import Backend
from kernels.precision import allows_tf32, set_tf32
from kernels.tiling import Gpu
from kernels.triton_launches import Launch, recorded


@dataclass(frozen=True)
class Step:
    """Hold what forward and backward of a training step run."""

    launches: list[Launch]
    other_bytes: int  # that PyTorch's own operations read and write


def record_step(opt: Settings, gpu: Gpu) -> Step:
    """Run forward and backward of the network at memory level 2; collect what a GPU would run."""
    with torch.device("meta"):
        model = models.factory.create(
            opt.replace(optMemory=2), opt.nClasses, Backend.from_module(triton_ops)
        )
    counter = _ByteCounter()
    before = allows_tf32()
    set_tf32(opt.tf32)
    try:
        with FakeTensorMode(), counter, recorded(gpu) as launches:
            state = {
                name: _empty(tensor).requires_grad_(tensor.requires_grad)
                for name, tensor in model.state_dict(keep_vars=True).items()
            }
            shape = (opt.batchSize, opt.nChannels, opt.imageSize, opt.imageSize)
            images = torch.empty(shape)
            targets = torch.empty(opt.batchSize, dtype=torch.int64)
            images = images.to(memory_format=torch.channels_last)
            counter.bytes = 0
            with autocast(torch.device("cpu"), opt.precision):
                loss = F.cross_entropy(functional_call(model, state, (images,)), targets)
            loss.backward()
    finally:
        set_tf32(before)
    return Step(launches, counter.bytes)


def _empty(like: Tensor) -> Tensor:
    layout = torch.channels_last if like.dim() == 4 else torch.contiguous_format
    return torch.empty(like.shape, dtype=like.dtype, memory_format=layout)


class _ByteCounter(TorchDispatchMode):
    """Add up the bytes of all tensors that operations other than views and allocations take."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        """Run an operation and count the tensors that it reads and writes."""
        out = op(*args, **(kwargs or {}))
        moves = op.namespace == "aten" and not op.is_view
        if moves and not op.overloadpacket.__name__.startswith(("empty", "new_empty", "detach")):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out
