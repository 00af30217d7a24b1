"""The networks by name: how each is made, its depths, its defaults, its flags. Loads no torch."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

# Layers per block of the ImageNet networks: paper Table 1; 264 and 232 are in no table of the
# authors, see docs/parity.md.
DENSENET_STAGES = {
    121: (6, 12, 24, 16),
    161: (6, 12, 36, 24),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
    232: (6, 12, 48, 48),
    264: (6, 12, 64, 48),
}
# Blocks per stage, as in fb.resnet.torch.
RESNET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
# The flags of dense blocks, with the values that they have for a network without any.
DENSE_BLOCK_FLAGS = {
    "optMemory": None,
    "shareGradInput": False,
    "optnet": False,
    "kernels": "torch",
    "growthRate": None,
    "reduction": None,
    "dropRate": 0.0,
    "initChannels": None,
    **dict.fromkeys(("d1", "d2", "d3", "d4"), 0),
}


@dataclass(frozen=True)
class TrainingDefaults:
    """How long and in what batches a network trains unless told otherwise."""

    num_epochs: int
    batch_size: int


@dataclass(frozen=True)
class Architecture:
    """A network as far as its flags are concerned; what has two values is (CIFAR, ImageNet shape).

    Args:
        title: as the paper writes it.
        network: "module:class" in this package.
        arguments: of the class, from the settings; not `num_classes`, and not `ops`, which networks
            get that read `--kernels`.
        depths: defaults of `--depth`.
        imagenet_stages: layers or blocks of each stage of the ImageNet shape, by depth.
        extra_layers: layers of the CIFAR shape that are in none of its three stages.
        layers_per_block: in the CIFAR shape (without, with) a bottleneck.
        training_defaults: defaults of `--nEpochs` and `--batchSize`.
        large_training_defaults: at the ImageNet shape, those of depths that have their own.
        milestones: of the CIFAR shape, parts of all epochs as (numerator, denominator).
        unused_flags: the flags that it does not read, with the values that they then have.
        wide_depths: at the ImageNet shape, the DenseNets of growth rate 48 instead of 32.
        basic_depths: at the ImageNet shape, where the depth decides about bottlenecks: the depths
            that have none. None: `--bottleneck` decides.
        shortcuts: defaults of `--shortcutType`; None if it has no shortcuts.
    """

    name: str
    title: str
    network: str
    arguments: Callable[[SimpleNamespace], dict[str, object]]
    depths: tuple[int, int]
    imagenet_stages: dict[int, tuple[int, ...]]
    extra_layers: int
    layers_per_block: tuple[int, int]
    training_defaults: tuple[TrainingDefaults, TrainingDefaults]
    milestones: tuple[tuple[int, int], ...]
    unused_flags: dict[str, object]
    large_training_defaults: dict[int, TrainingDefaults] = field(default_factory=dict)
    wide_depths: tuple[int, ...] = ()
    basic_depths: tuple[int, ...] | None = None
    shortcuts: tuple[str, str] | None = None

    def uses(self, flag: str) -> bool:
        """Tell whether a flag has an effect on this network."""
        return flag not in self.unused_flags

    def import_network(self) -> Callable:
        """Import the class, and PyTorch with it."""
        module, name = self.network.split(":")
        return getattr(importlib.import_module(f"models.{module}"), name)

    def defaults_for(self, is_imagenet: bool, depth: int) -> TrainingDefaults:
        """Return how the network of this shape and depth trains unless told otherwise."""
        own = self.large_training_defaults if is_imagenet else {}
        return own.get(depth, self.training_defaults[is_imagenet])


def _densenet(opt: SimpleNamespace) -> dict[str, object]:
    return {
        "stages": opt.stages,
        "growth_rate": opt.growthRate,
        "init_channels": opt.initChannels,
        "imagenet_stem": opt.imagenetShape,
        "bottleneck": opt.bottleneck,
        "compression": opt.reduction,
        "drop_rate": opt.dropRate,
        "memory_level": opt.optMemory,
    }


def _resnet(opt: SimpleNamespace) -> dict[str, object]:
    return {
        "stages": opt.stages,
        "imagenet_stem": opt.imagenetShape,
        "bottleneck": opt.bottleneck,
        "shortcut": opt.shortcutType,
    }


def _preresnet(opt: SimpleNamespace) -> dict[str, object]:
    return _resnet(opt) | {"pre_activation": True}


def _residual(
    name: str, title: str, arguments: Callable, depth: int, unused_flags: dict[str, object]
) -> Architecture:
    """Return a residual network of fb.resnet.torch, whose schedule and stages both kinds share."""
    return Architecture(
        name,
        title,
        "resnet:ResNet",
        arguments,
        depths=(depth, 50),
        imagenet_stages=RESNET_STAGES,
        extra_layers=2,
        layers_per_block=(2, 3),
        training_defaults=(TrainingDefaults(164, 64), TrainingDefaults(90, 256)),
        milestones=((81, 164), (122, 164)),
        unused_flags=unused_flags,
        basic_depths=(18, 34),
        shortcuts=("A", "B"),
    )


ARCHITECTURES: dict[str, Architecture] = {
    network.name: network
    for network in (
        Architecture(
            "densenet",
            "DenseNet",
            "densenet:DenseNet",
            _densenet,
            depths=(100, 121),
            imagenet_stages=DENSENET_STAGES,
            extra_layers=4,
            layers_per_block=(1, 2),
            training_defaults=(TrainingDefaults(300, 64), TrainingDefaults(90, 256)),
            # The paper, section 4.2: smaller batches, for ten epochs more.
            large_training_defaults={161: TrainingDefaults(100, 128)},
            milestones=((1, 2), (3, 4)),
            unused_flags={"shortcutType": None},
            wide_depths=(161, 232),
        ),
        _residual("resnet", "ResNet", _resnet, 110, {"bottleneck": None} | DENSE_BLOCK_FLAGS),
        _residual("preresnet", "pre-activation ResNet", _preresnet, 164, DENSE_BLOCK_FLAGS),
    )
}
