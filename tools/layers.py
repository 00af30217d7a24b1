"""List the layers of a network, with the multiply-adds and the output of each."""

from functools import partial
from typing import NamedTuple

from cli.flag_types import Settings


class Layer(NamedTuple):
    """Describe a convolution or the classifier, with its multiply-adds for one image."""

    name: str
    kind: str
    in_channels: int
    shape: tuple[int, ...]  # of the output, (C, H, W) or (C,)
    macs: int


def list_layers(model, image_size: int) -> list[Layer]:
    """Count the layers of a network on the meta device, in the order they run."""
    import torch
    from torch import nn

    layers = []

    def record(name: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        kind = "linear"
        if isinstance(module, nn.Conv2d):
            kind = f"conv {'x'.join(map(str, module.kernel_size))}"
            kind += f"/{module.stride[0]}" if module.stride[0] > 1 else ""
        macs = output[0].numel() * module.weight[0].numel()
        shape = tuple(output.shape[1:])
        if kind == "linear":  # of each pixel where the images are feature maps: (H, W, C)
            shape = (shape[-1], *shape[:-1])
        layers.append(Layer(name, kind, module.weight.shape[1], shape, macs))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(partial(record, name))
    with torch.no_grad():
        channels = next(model.parameters()).shape[1]  # of the first convolution's input
        model.eval()(torch.empty(1, channels, image_size, image_size, device="meta"))
    return layers


def build(opt: Settings):
    """Build the network of `opt.nClasses` classes on the meta device, without weights."""
    import torch

    import models.factory

    with torch.device("meta"):
        return models.factory.create(opt.replace(optMemory=0), opt.nClasses)
