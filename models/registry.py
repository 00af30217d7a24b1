"""List the networks by name: class, depths, defaults, flags. Does not import PyTorch."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

# Layers per block of the ImageNet networks: paper, Table 1; for 264 and 232 see docs/parity.md.
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
# Whose DenseNets' weights are read and written: models/weight_formats.py has their rules.
LIBRARIES = (
    "torchvision", "timm", "monai", "torchxrayvision", "segmentation-models", "keras", "paddle",
)  # fmt: skip
# Flags that only dense blocks read -> their values in the settings of other networks.
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
class Architecture:
    """Describe a network and its flags. Pairs: (CIFAR shape, up to 64 pixels; ImageNet shape)."""

    name: str
    title: str  # the paper's name
    network: str  # "module:class" in this package
    arguments: dict[str, str]  # of the class -> setting; `num_classes` and `ops` come on top
    depths: tuple[int, int]  # defaults of `--depth`
    imagenet_stages: dict[int, tuple[int, ...]]  # depth -> layers or blocks of each stage
    extra_layers: int  # of the CIFAR shape, outside of its three stages
    layers_per_block: tuple[int, int]  # of the CIFAR shape, (without, with) a bottleneck
    training_defaults: tuple[tuple[int, int], tuple[int, int]]  # each (nEpochs, batchSize)
    milestones: tuple[tuple[int, int], ...]  # of the CIFAR shape: (a, b) is epoch a / b * nEpochs
    unused_flags: dict[str, object]  # flags that the network does not read -> values recorded
    large_training_defaults: dict[int, tuple[int, int]] = field(default_factory=dict)  # by depth
    wide_depths: tuple[int, ...] = ()  # of the ImageNet shape, with growth rate 48 instead of 32
    # Depths of the ImageNet shape without bottlenecks; None if `--bottleneck` decides.
    basic_depths: tuple[int, ...] | None = None
    shortcuts: tuple[str, str] | None = None  # defaults of `--shortcutType`; None without shortcuts

    def uses(self, flag: str) -> bool:
        """Tell whether the network reads a flag."""
        return flag not in self.unused_flags

    def import_network(self) -> Callable:
        """Import the class, and PyTorch with it."""
        module, name = self.network.split(":")
        return getattr(importlib.import_module(f"models.{module}"), name)

    def training_defaults_for(self, is_imagenet: bool, depth: int) -> tuple[int, int]:
        """Return the number of epochs and the batch size of a shape and depth."""
        own = self.large_training_defaults if is_imagenet else {}
        return own.get(depth, self.training_defaults[is_imagenet])


# Arguments of the classes -> the settings that they come from.
_SHARED = {
    "stages": "stages",
    "in_channels": "nChannels",
    "imagenet_stem": "imagenetShape",
    "bottleneck": "bottleneck",
}
_DENSENET = _SHARED | {
    "growth_rate": "growthRate",
    "init_channels": "initChannels",
    "compression": "reduction",
    "drop_rate": "dropRate",
    "memory_level": "optMemory",
}
_RESIDUAL = _SHARED | {"shortcut": "shortcutType"}

_RESNET = Architecture(
    "resnet",
    "ResNet",
    "resnet:ResNet",
    _RESIDUAL,
    depths=(110, 50),
    imagenet_stages=RESNET_STAGES,
    extra_layers=2,
    layers_per_block=(2, 3),
    training_defaults=((164, 64), (90, 256)),
    milestones=((81, 164), (122, 164)),
    unused_flags={"bottleneck": None} | DENSE_BLOCK_FLAGS,
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
            _DENSENET,
            depths=(100, 121),
            imagenet_stages=DENSENET_STAGES,
            extra_layers=4,
            layers_per_block=(1, 2),
            training_defaults=((300, 64), (90, 256)),
            # Paper, section 4.2: batch 128 to fit GPU memory, and ten more epochs.
            large_training_defaults={161: (100, 128)},
            milestones=((1, 2), (3, 4)),
            unused_flags={"shortcutType": None},
            wide_depths=(161, 232),
        ),
        _RESNET,
        replace(
            _RESNET,
            name="preresnet",
            title="pre-activation ResNet",
            network="resnet:PreActResNet",
            depths=(164, 50),
            unused_flags=DENSE_BLOCK_FLAGS,
        ),
    )
}
