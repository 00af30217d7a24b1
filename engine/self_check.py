"""Compare Triton with plain PyTorch on this device: a small network, forward and backward.

Both train it in the run's precision, from the same weights and input. Plain PyTorch in float64 is
what is right; how far plain PyTorch in the run's precision is from it, is what the precision
`explains`. A result of Triton may differ from that of plain PyTorch, relative to the norm of what
is right, by

    4 * explained + 8 * unit     in forward: outputs and statistics
    2 * explained + KINK         in backward: gradients

where `unit` is the relative error of a factor of a product. It allows for other places of rounding,
and for tensor cores that cut factors off. KINK allows for values so near to 0 that rounding decides
whether ReLU passes their gradient, all of it or nothing: two implementations in plain PyTorch
(levels 0 and 4, single precision, 19 images of 30 x 30) differed by more than 0.001 in 6 of 9
networks, and by up to 0.02. So a gradient that is wrong by less than KINK, where forward shows
nothing, passes; a difference counts if all seeds show it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from engine.precision import PRECISIONS, autocast
from kernels.backend import REFERENCE, Backend
from kernels.precision import allows_tf32
from models.densenet import DenseNet
from models.layers import set_eps

KINK, KINK_IN_SINGLE = 0.1, 0.03
# Images, and their height and width: on a GPU the blocks have rows for large and for small tiles,
# and a rest. The interpreter takes seconds.
SIZES = {"cuda": (24, 30), "cpu": (2, 6)}
STAGES = (2, 1)  # layers of each block: two read the same channels, and both kinds of epilogue run
LEVEL = 4  # of memory: recomputes in backward, and so runs all that levels 2 and 3 run
SEEDS = (1608, 6993, 2017)  # a difference counts if all show it: a kink may show in one


@dataclass(frozen=True)
class Difference:
    """Hold how far a result of Triton is from that of plain PyTorch, relative to its norm."""

    name: str  # such as "gradient of features.denseblock1.denselayer1.conv1.weight"
    size: float  # NaN if one of them has a NaN
    explained: float  # how far plain PyTorch is from float64
    unit: float  # relative error of a factor of a product

    @property
    def is_allowed(self) -> bool:
        """Return whether the precision explains the difference; a NaN it never does."""
        return self.size <= self.bound

    @property
    def bound(self) -> float:
        """Return the largest size that is allowed."""
        if self.is_gradient:
            kink = KINK_IN_SINGLE if self.unit < 2.0**-20 else KINK
            return 2 * self.explained + kink
        return 4 * self.explained + 8 * self.unit

    @property
    def is_gradient(self) -> bool:
        """Return whether the backward pass computes the result."""
        return self.name.startswith("gradient")


def find_fault(opt: SimpleNamespace, device: torch.device, triton: Backend) -> str | None:
    """Return in words what Triton computes wrongly, or None; see `measure_differences`."""
    for seed in SEEDS:
        differences = measure_differences(opt, device, triton, seed)
        wrong = [each for each in differences if not each.is_allowed]
        if not wrong:
            return None
    # What is wrong in forward makes gradients wrong as well; of those named, a NaN says most.
    worst = max(
        wrong,
        key=lambda each: (not each.is_gradient, math.isnan(each.size), each.size / each.bound),
    )
    return (
        f"Triton's {worst.name} differs from plain PyTorch's by {worst.size:.1e} of its norm, "
        f"and precision {opt.precision} explains {worst.bound:.1e}"
    )


def measure_differences(
    opt: SimpleNamespace, device: torch.device, triton: Backend, seed: int = SEEDS[0]
) -> list[Difference]:
    """Return the difference of each result: outputs, statistics, gradients.

    Leaves random generators and settings as they are, and no memory allocated.

    Args:
        opt: reads precision, growthRate, bottleneck, reduction, dropRate and bnEps.

    Raises:
        Exception: whatever Triton's compiler or a launch raises.
    """
    with _isolated(device):
        got = _train(opt, device, triton, opt.precision, seed)
        plain = _train(opt, device, REFERENCE, opt.precision, seed)
        exact = _train(opt, device, REFERENCE, "double", seed)
    unit, differences = _unit(opt.precision), []
    for name, right in exact.items():
        norm = right.norm().clamp(min=torch.finfo(right.dtype).tiny)
        explained = ((plain[name] - right).norm() / norm).item()
        size = ((got[name] - plain[name]).norm() / norm).item()
        differences.append(Difference(name, size, explained, unit))
    return differences


def _unit(precision: str) -> float:
    """Return the largest relative error of a factor, rounded or cut off, in a product."""
    dtype = PRECISIONS[precision].autocast or PRECISIONS[precision].dtype
    if dtype == torch.float32:  # products of TF32: one, or three whose factors have 21 bits
        return 2.0**-10 if allows_tf32() else 2.0**-21
    return torch.finfo(dtype).eps


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Restore random generators and cuDNN's setting, and free memory, when the block ends."""
    trials, on_cuda = torch.backends.cudnn.benchmark, device.type == "cuda"
    try:
        torch.backends.cudnn.benchmark = False  # its trials take longer than the check
        with torch.random.fork_rng([device] if on_cuda else []):
            yield
    finally:
        torch.backends.cudnn.benchmark = trials
        if on_cuda:
            torch.cuda.empty_cache()


def _train(
    opt: SimpleNamespace, device: torch.device, ops: Backend, precision: str, seed: int
) -> dict[str, Tensor]:
    """Run a step, then evaluate; return all results in float64 on the CPU, by name."""
    dtype, channels_last = PRECISIONS[precision].dtype, torch.channels_last
    _seed(device, seed)  # the draws of dropout follow those below, the same for every backend
    model = _network(opt, ops).to(device, dtype, memory_format=channels_last).train()
    count, side = SIZES[device.type]
    # A mean of 0 would be known to no digit.
    x = torch.randn(count, 2 * opt.growthRate, side, side) + 0.5
    x = x.to(device, dtype, memory_format=channels_last).requires_grad_()
    upstream = torch.randn(count, model.features[-1].num_features).to(device)
    with autocast(device, precision):
        out = model(x)
    out.backward(upstream.to(out.dtype))
    with torch.no_grad(), autocast(device, precision):
        evaluated = model.eval()(x)
    results = {"output": out, "output in evaluation": evaluated, "gradient of the input": x.grad}
    results |= {f"gradient of {name}": each.grad for name, each in model.named_parameters()}
    results |= dict(model.named_buffers())
    return {name: each.detach().double().cpu() for name, each in results.items()}


def _network(opt: SimpleNamespace, ops: Backend) -> DenseNet:
    """Make the blocks of a network, (N, 2k, H, W) to (N, C), with norms as training leaves them."""
    model = DenseNet(
        STAGES,
        opt.growthRate,
        2 * opt.growthRate,
        1,
        bottleneck=opt.bottleneck,
        compression=opt.reduction,
        drop_rate=opt.dropRate,
        memory_level=LEVEL,
        ops=ops,
    )
    # They would run without Triton, and cuBLAS would keep memory.
    model.features.conv0 = model.classifier = nn.Identity()
    set_eps(model, opt.bnEps)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        with torch.no_grad():
            norm.weight[::3] *= -1
    return model


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of this device, of no other."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
