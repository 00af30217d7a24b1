"""Compute the loss of a step from what a network returns: its logits, or those of several heads.

In training a network with auxiliary classifiers returns [(logits, weight), ...], its own first, at
weight 1. In evaluation every network returns its logits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (N, C) and targets (N,): the mean, a scalar
Outputs = Tensor | list[tuple[Tensor, float | Tensor]]


def squared_hinge(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over images of the summed squared hinge losses, one class against the rest.

    That is an L2-SVM (arXiv:1306.0239), which DSN trains: sum over classes of max(0, 1 - y z)^2,
    where y is 1 for the target and -1 for every other class.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # as cross entropy does
    signs = torch.full_like(logits, -1).scatter_(1, targets[:, None], 1)
    return (1 - signs * logits).clamp(min=0).square().sum(1).mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over images of the cross entropy of a softmax."""
    return F.cross_entropy(logits, targets)  # looked up in each call: tests replace it


LOSSES: dict[str, Loss] = {"crossEntropy": cross_entropy, "squaredHinge": squared_hinge}


def network_logits(outputs: Outputs) -> Tensor:
    """Return the logits, (N, C), of the network's own classifier."""
    return outputs if isinstance(outputs, Tensor) else outputs[0][0]


def mean_loss(loss: Loss, outputs: Outputs, targets: Tensor) -> Tensor:
    """Return the weighted sum of the losses of all classifiers, a scalar."""
    if isinstance(outputs, Tensor):
        return loss(outputs, targets)
    return sum(weight * loss(logits, targets) for logits, weight in outputs)
