"""Create SGD as one fused kernel; set its learning rate; save its momentum by parameter names."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

MOMENTUM_BUFFER = "momentum_buffer"  # torch.optim.SGD's name of it


def create(opt: SimpleNamespace, model: nn.Module, lr: float | Tensor) -> torch.optim.SGD:
    """Return the optimizer of all parameters of a network.

    Args:
        lr: a number, or a scalar tensor on the device for steps that a CUDA graph captures.
    """
    # Parity: one group, so that weight decay acts on BN and biases as well.
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=opt.momentum,
        dampening=0,
        weight_decay=opt.weightDecay,
        nesterov=opt.nesterov and opt.momentum > 0,
        fused=True,
    )
    for parameter in model.parameters():
        if state := initial_state(opt, parameter):
            optimizer.state[parameter] = state
    return optimizer


def initial_state(opt: SimpleNamespace, parameter: Tensor) -> dict[str, Tensor]:
    """Return what the optimizer keeps for a parameter before its first step."""
    # Made here, in the parameter's memory format: the fused kernel reads both linearly, and leaves
    # a buffer that it makes itself uninitialised if it skips the first step.
    return {MOMENTUM_BUFFER: torch.zeros_like(parameter)} if opt.momentum > 0 else {}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)  # in place: a captured step reads this memory
        else:
            group["lr"] = lr


def reset_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Drop what a step leaves in Python, or has left where an error has ended it."""
    optimizer.zero_grad(set_to_none=True)
    if scaler.is_enabled():
        scaler._per_optimizer_states.clear()  # else a second `step` before `update` is an error
        for name in ("grad_scale", "found_inf"):  # lent by the scaler; it would multiply the scales
            vars(optimizer).pop(name, None)


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the momentum of each parameter by its name; {} without momentum."""
    return {
        name: optimizer.state[parameter][MOMENTUM_BUFFER]
        for name, parameter in model.named_parameters()
        if MOMENTUM_BUFFER in optimizer.state[parameter]
    }


def expected_state(settings: dict[str, object], model: nn.Module) -> dict[str, Tensor]:
    """Return tensors with the names and shapes that `state_by_name` has under some settings."""
    return dict(model.named_parameters()) if settings["momentum"] > 0 else {}


def load_state_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Tensor]
) -> None:
    """Restore a `state_by_name`; --override may have switched momentum on or off since."""
    for name, buffer in state_by_name(optimizer, model).items():
        if name in saved:
            buffer.copy_(saved[name])  # copied, not replaced, to keep its memory format
