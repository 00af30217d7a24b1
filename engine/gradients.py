"""Average a step's gradients over all processes, and find out whether all are finite."""

import torch
from torch import Tensor, nn

from distributed.world import World


class GradientReducer:
    """Average the gradients of parameters, all of one dtype, after backward.

    With several processes the gradients and the loss share one buffer: a single all-reduce averages
    them, and shows every process a value that is not finite in any.

    Args:
        world: the processes; its `size` and `all_reduce_` are used.
    """

    def __init__(self, parameters: list[nn.Parameter], world: World):
        self._parameters, self._world = parameters, world
        self._bucket = None
        if world.size > 1:
            sizes = [parameter.numel() for parameter in parameters]
            self._bucket = parameters[0].new_zeros(sum(sizes) + 1)  # the last one is the loss
            # In the memory format of each parameter: the optimizer reads both linearly.
            self._views = [
                part.as_strided(parameter.shape, parameter.stride())
                for part, parameter in zip(self._bucket[:-1].split(sizes), parameters, strict=True)
            ]

    def reduce(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Average the gradients; return whether the loss and the gradients are finite.

        Args:
            loss: of this process, a scalar.

        Returns:
            Two scalars, bool on the device, which cover all processes.
        """
        loss = loss.detach()
        for parameter in self._parameters:
            if parameter.grad is None:  # of a layer that the step has dropped: it still decays
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters]
        if self._bucket is None:
            return torch.isfinite(loss), _are_finite(gradients)
        torch._foreach_copy_(self._views, gradients)
        self._bucket[-1] = loss
        self._world.all_reduce_(self._bucket)
        self._bucket /= self._world.size
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
        return torch.isfinite(self._bucket[-1]), _are_finite([self._bucket[:-1]])


def _are_finite(tensors: list[Tensor]) -> Tensor:
    # torch.amp.GradScaler's own test, at a scale of 1: one kernel for all tensors, which takes a
    # tenth of the time of their largest norm.
    found = torch.zeros((), device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(found))
    return found == 0
