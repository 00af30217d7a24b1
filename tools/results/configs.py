"""Load the configs of configs/, and compare settings to tell which run belongs to which config."""

import functools
import math
from typing import NamedTuple

import opts
from cli.flag_types import Settings, as_text
from tools import cli
from tools.results.published import load_yaml

# Flags that resuming may change, but that make a run another measurement.
ALSO_COMPARED = ("retrain", "epochNumber", "tenCrop")


class Config(NamedTuple):
    """Hold a file of configs/: settings; table, column, error, params of its `paper:`, or {}."""

    opt: Settings
    claim: dict[str, object]


@functools.cache
def configs() -> dict[str, Config]:
    """Load configs/*/*.yaml by name, such as "c10plus/densenet-L40-k12", or raise UsageError."""
    found = {}
    for path in (cli.ROOT / "configs").glob("*/*.yaml"):
        name = f"{path.parent.name}/{path.stem}"
        claim = load_yaml(path.read_text()).get("paper", {})
        if "error" in claim:
            claim["error"] = float(claim["error"])
        found[name] = Config(opts.parse(["--config", str(path)]), claim)
    return dict(sorted(found.items()))


def comparable_settings(opt: Settings) -> tuple[tuple[str, str], ...]:
    """Return (flag, value) of the settings that two runs share if only their seeds differ."""
    settings = opts.training_settings(opt) | {name: getattr(opt, name) for name in ALSO_COMPARED}
    del settings["manualSeed"]
    return tuple(sorted((name, as_text(value)) for name, value in settings.items()))


@functools.cache
def names_by_settings() -> dict[tuple, str]:
    """Map the `comparable_settings` of each config to its name."""
    return {comparable_settings(config.opt): name for name, config in configs().items()}


class Counts(NamedTuple):
    """Count the size of a network: trained numbers; for one image multiply-adds, activations."""

    parameters: int
    macs: int
    activations: int  # outputs of convolutions and of the classifier


_counts: dict[tuple, Counts] = {}  # by network: counting one takes up to a second


def count(opt: Settings) -> Counts:
    """Count the network of some settings as the paper does.

    With 10 classes at the CIFAR shape, in the CIFAR-100 columns too; with 1000 at the ImageNet
    shape.
    """
    names = [name for name, flag in opts.FLAGS.items() if flag.role == "model"]
    key = tuple(as_text(getattr(opt, name)) for name in [*names, "imageSize"])
    if key not in _counts:
        from torch.nn import BatchNorm2d

        from tools import layers

        model = layers.build(opt.replace(nClasses=1000 if opt.imagenetShape else 10))
        for module in model.modules():
            if isinstance(module, BatchNorm2d):  # no multiply-adds, but half of the time
                module.forward = lambda features: features
        parameters = sum(parameter.numel() for parameter in model.parameters())
        found = layers.list_layers(model, opt.imageSize)
        outputs = sum(math.prod(layer.shape) for layer in found)
        _counts[key] = Counts(parameters, sum(layer.macs for layer in found), outputs)
    return _counts[key]
