"""What a network counts: `python -m tools.describe` with any flags or `--config` of main.py."""

import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import opts
from errors import RunError, UsageError


@dataclass(frozen=True)
class Layer:
    """One convolution or the classifier, for one image.

    Args:
        shape: of the output, (C, H, W) or (C,).
    """

    name: str
    kind: str
    in_channels: int
    shape: tuple[int, ...]
    macs: int
    activations: int


def measure(model, image_size: int) -> list[Layer]:
    """Layers in the order they run, counted by running a network on the meta device.

    Multiply-adds and activations (outputs) are those of convolutions and the classifier.
    """
    import torch
    from torch import nn

    layers: list[Layer] = []

    def record(name: str):
        def hook(module, inputs, output) -> None:
            shape = tuple(output.shape[1:])
            if isinstance(module, nn.Conv2d):
                kernel = "x".join(map(str, module.kernel_size))
                stride = f"/{module.stride[0]}" if module.stride[0] > 1 else ""
                kind, in_channels = f"conv {kernel}{stride}", module.in_channels
            else:
                kind, in_channels = "linear", module.in_features
            weights_per_output = module.weight[0].numel()
            outputs = output[0].numel()
            macs = outputs * weights_per_output
            layers.append(Layer(name, kind, in_channels, shape, macs, outputs))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    return layers


def build(opt: SimpleNamespace):
    """The network of the settings, without memory for its weights.

    Raises:
        UsageError: the number of classes is in the data only.
    """
    import torch

    import datasets
    import models

    known = datasets.NUM_CLASSES | {"synthetic": datasets.SYNTHETIC_CLASSES}
    num_classes = opt.nClasses or known.get(opt.dataset)
    if num_classes is None:
        raise UsageError(f"the classes of {opt.dataset} are in its data", "add --nClasses N")
    with torch.device("meta"):
        return models.create(opt, num_classes)


def render(opt: SimpleNamespace, model, layers: list[Layer]) -> str:
    """The counts as the text that is printed."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    macs = sum(layer.macs for layer in layers)
    activations = sum(layer.activations for layer in layers)
    lines = [
        f"{opt.netType}, L={opt.depth}, k={opt.growthRate}, "
        f"{model.classifier.out_features} classes, input 3 x {opt.imageSize} x {opt.imageSize}",
        f"stages         {', '.join(map(str, opt.stages))} layers per block",
        f"parameters     {parameters:,}",
        f"multiply-adds  {macs:,} per image (convolutions and classifier)",
        f"activations    {activations:,} per image (their outputs)",
        "",
        f"{'layer':<44} {'kind':<10} {'channels':>14} {'size':>9} {'multiply-adds':>15}",
    ]
    for layer in layers:
        channels = f"{layer.in_channels} -> {layer.shape[0]}"
        size = " x ".join(map(str, layer.shape[1:]))
        row = f"{layer.name:<44} {layer.kind:<10} {channels:>14} {size:>9} {layer.macs:>15,}"
        lines.append(row)
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the counts of the network that the flags describe."""
    try:
        opt = opts.parse(argv)
        model = build(opt)
    except RunError as error:
        print(error.report(), file=sys.stderr)
        return error.code
    print(render(opt, model, measure(model, opt.imageSize)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    sys.exit(main(sys.argv[1:]))
