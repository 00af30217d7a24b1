"""Make small DenseNets for the tests; return the results of one training step of a network."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.densenet import DenseNet

BASIC = {"bottleneck": False}
FORMS = {
    "BC": {},
    "BC, dropout": {"drop_rate": 0.3},
    "B": {"compression": 1.0},
    "basic": BASIC,
    "basic, dropout": BASIC | {"drop_rate": 0.3},
    "one block": {"stages": (3,)},
    "one layer a block": {"stages": (1, 1, 1)},
    "ImageNet": {"imagenet_stem": True, "stages": (2, 1, 2)},
    "ImageNet, basic, dropout": BASIC | {"imagenet_stem": True, "drop_rate": 0.3},
}
Results = dict[str, Tensor]


def network(level: int, form: str = "BC", seed: int = 3, **changes) -> DenseNet:
    """Make a small network in double precision; its batch norms are not near the identity."""
    torch.manual_seed(seed)
    sizes = {"stages": (2, 2), "growth_rate": 5, "init_channels": 7, "num_classes": 3}
    model = DenseNet(**sizes | FORMS[form] | changes, memory_level=level).double()
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        with torch.no_grad():
            norm.weight[::3] *= -1
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def pictures(form: str = "BC", count: int = 5, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Make random images of uneven height and width, with their classes."""
    torch.manual_seed(seed)
    size = (45, 37) if "ImageNet" in form else (13, 10)
    return torch.randn(count, 3, *size, dtype=torch.float64), torch.arange(count) % 3


def one_step(model: nn.Module, images: Tensor, targets: Tensor, seed: int = 5, low=None) -> Results:
    """Return loss, gradients and buffers of a training step; `low`, a type to autocast to."""
    images = images.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        loss = F.cross_entropy(model(images), targets)
    model.zero_grad()
    loss.backward()
    return results(model, loss=loss.detach(), image=images.grad)


def results(model: nn.Module, **more: Tensor) -> Results:
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {**more, **gradients, **buffers}


def step(
    level: int,
    form: str = "BC",
    change: Callable[[DenseNet], None] | None = None,
    *,
    count: int = 5,
    seed: int = 4,
    dropout_seed: int = 5,
    dtype: torch.dtype = torch.float64,
    low: torch.dtype | None = None,
) -> Results:
    """Run `one_step` of `network(level, form)`, changed first, on `pictures(form, count, seed)`."""
    model, (images, targets) = network(level, form).to(dtype), pictures(form, count, seed)
    if change:
        change(model)
    return one_step(model, images.to(dtype), targets, dropout_seed, low)


level_0_step = cache(lambda form="BC", change=None, **options: step(0, form, change, **options))


def largest_difference(got: Results, want: Results) -> float:
    assert got.keys() == want.keys()
    assert all((got[name] is None) == (want[name] is None) for name in want)
    return max((got[n] - want[n]).abs().max().item() for n in want if want[n] is not None)


def relative_differences(got: Results, want: Results) -> Results:
    """Return the largest difference of each result over its largest value."""
    assert got.keys() == want.keys()
    return {
        name: (got[name].double() - want[name].double()).abs().max() / want[name].abs().max()
        for name in want
    }


def mean_error(got: Results, want: Results) -> float:
    """Return the mean, over the results of a step, of the difference's norm relative to theirs."""
    assert got.keys() == want.keys()
    pairs = [(got[name].double(), want[name].double()) for name in want]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).mean().item()
