"""Make networks of command lines for the tests; return the results of one training step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models.factory
import opts


def network(line: str, num_classes: int = 10) -> nn.Module:
    return models.factory.create(opts.parse(line.split()), num_classes)


def scramble(model: nn.Module) -> nn.Module:
    """Randomise batch norms: at weight 1 and bias 0 a mistake with them would not show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def one_step(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the logits, gradients and buffers of a training step."""
    logits = model.train()(images)
    F.cross_entropy(logits, targets).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **gradients, **dict(model.named_buffers())}


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def photographs(count: int = 2, size: int = 12, classes: int = 10) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, size, size, dtype=torch.float64)
    return images, torch.randint(classes, (count,))
