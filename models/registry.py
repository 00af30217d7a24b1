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
# Flags that describe dense blocks alone -> their values in the settings of other networks.
_DENSE_BLOCKS = {
    "optMemory": None,
    "shareGradInput": False,
    "optnet": False,
    "kernels": "torch",
    "growthRate": None,
    "reduction": None,
    "initChannels": None,
    **dict.fromkeys(("d1", "d2", "d3", "d4"), 0),
}
# The same of batch normalisation, and of every flag that some networks do not read.
_BATCH_NORM = {"bnEps": 1e-5, "syncBN": False}
_SOME_NETWORKS = {
    "bottleneck": None,
    "shortcutType": None,
    "dropRate": 0.0,
    "widen": None,
    "columns": None,
    "stochasticDepth": 1.0,
    "dropPath": 0.0,
    "auxWeight": 0.1,
    **_BATCH_NORM,
    **_DENSE_BLOCKS,
}


def _all_but(*used: str) -> dict[str, object]:
    return {flag: value for flag, value in _SOME_NETWORKS.items() if flag not in used}


@dataclass(frozen=True)
class Architecture:
    """Describe a network and its flags. Pairs: (CIFAR shape, up to 64 pixels; ImageNet shape)."""

    name: str
    title: str  # the paper's name
    network: str  # "module:class" in this package
    arguments: dict[str, str]  # of the class -> setting; `num_classes` and `ops` come on top
    depths: tuple[int, int]  # defaults of `--depth`
    training_defaults: tuple[tuple[int, int], tuple[int, int]]  # each (nEpochs, batchSize)
    milestones: tuple[tuple[int, int], ...]  # of the CIFAR shape: (a, b) is epoch a / b * nEpochs
    unused_flags: dict[str, object]  # flags that the network does not read -> values recorded
    # Depth -> layers or blocks of each stage; {}: there is no ImageNet shape.
    imagenet_stages: dict[int, tuple[int, ...]] = field(default_factory=dict)
    # The same of the CIFAR shape; {}: three stages of equal length, of any depth by the next two.
    cifar_stages: dict[int, tuple[int, ...]] = field(default_factory=dict)
    extra_layers: int = 0  # of the CIFAR shape, outside of its three stages
    layers_per_block: tuple[int, int] = (1, 1)  # of it, (without, with) a bottleneck
    min_size: int = 8  # height and width of the smallest image in pixels
    narrowest: int = 16  # channels of the narrowest layer that `--widen` multiplies
    defaults: dict[str, object] = field(default_factory=dict)  # of flags, where they are its own
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
_PLAIN = {"in_channels": "nChannels", "drop_rate": "dropRate", "widen": "widen"}

_RESNET = Architecture(
    "resnet",
    "ResNet",
    "resnet:ResNet",
    _RESIDUAL | {"survival": "stochasticDepth"},
    depths=(110, 50),
    imagenet_stages=RESNET_STAGES,
    extra_layers=2,
    layers_per_block=(2, 3),
    training_defaults=((164, 64), (90, 256)),
    milestones=((81, 164), (122, 164)),
    unused_flags=_all_but("shortcutType", "stochasticDepth", *_BATCH_NORM),
    basic_depths=(18, 34),
    shortcuts=("A", "B"),
)
# The defaults of the networks below are the settings that their papers or their authors' files
# have: docs/parity.md, "The other networks of Table 2".
_NIN = Architecture(
    "nin",
    "Network in Network",
    "plain:NIN",
    _PLAIN,
    depths=(9, 9),
    cifar_stages={9: (3, 3, 3)},
    narrowest=64,
    training_defaults=((260, 128),) * 2,
    milestones=((201, 260), (231, 260)),
    unused_flags=_all_but("dropRate", "widen"),
    defaults={"dropRate": 0.5, "widen": 1.0, "nesterov": False},
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
            unused_flags=_all_but("bottleneck", "dropRate", *_BATCH_NORM, *_DENSE_BLOCKS),
            wide_depths=(161, 232),
        ),
        _RESNET,
        replace(
            _RESNET,
            name="preresnet",
            title="pre-activation ResNet",
            network="resnet:PreActResNet",
            arguments=_RESIDUAL,
            depths=(164, 50),
            unused_flags=_all_but("shortcutType", "bottleneck", *_BATCH_NORM),
        ),
        Architecture(
            "wideresnet",
            "Wide ResNet",
            "resnet:PreActResNet",
            _RESIDUAL | {"drop_rate": "dropRate", "widen": "widen"},
            depths=(28, 28),
            extra_layers=4,  # the shortcuts' convolutions count
            layers_per_block=(2, 2),
            training_defaults=((200, 128),) * 2,
            milestones=((60, 200), (120, 200), (160, 200)),
            unused_flags=_all_but("shortcutType", "dropRate", "widen", *_BATCH_NORM),
            shortcuts=("B", "B"),
            defaults={"dropRate": 0.0, "widen": 10.0, "lrDecay": 0.2, "weightDecay": 5e-4},
        ),
        _NIN,
        replace(_NIN, name="nin-svhn", network="plain:NINForSVHN"),
        replace(
            _NIN,
            name="allcnn",
            title="All-CNN",
            network="plain:AllCNN",
            training_defaults=((350, 128),) * 2,
            milestones=((201, 350), (251, 350), (301, 350)),
            min_size=9,
            defaults=_NIN.defaults | {"LR": 0.05, "weightDecay": 1e-3},
        ),
        replace(
            _NIN,
            name="dsn",
            title="Deeply-Supervised Net",
            network="plain:DSN",
            arguments=_PLAIN | {"image_size": "imageSize", "aux_weight": "auxWeight"},
            training_defaults=((400, 100),) * 2,
            milestones=((301, 400), (341, 400)),
            unused_flags=_all_but("dropRate", "widen", "auxWeight"),
            defaults=_NIN.defaults
            | {"LR": 0.025, "lrDecay": 0.05, "weightDecay": 5e-4, "loss": "squaredHinge"},
        ),
        Architecture(
            "highway",
            "Highway Network",
            "highway:HighwayNet",
            _PLAIN,
            depths=(19, 19),
            cifar_stages={19: (5, 6, 6)},
            narrowest=32,
            training_defaults=((400, 100),) * 2,
            milestones=((201, 400), (301, 400), (351, 400)),
            unused_flags=_all_but("dropRate", "widen"),
            defaults={"dropRate": 0.2, "widen": 1.0, "LR": 0.025, "weightDecay": 1e-3},
        ),
        Architecture(
            "fractalnet",
            "FractalNet",
            "fractalnet:FractalNet",
            _PLAIN | {"stages": "stages", "columns": "columns", "drop_path": "dropPath"},
            depths=(21, 21),
            cifar_stages={5 * length + 1: (length,) * 5 for length in (1, 2, 4, 8)},
            training_defaults=((400, 100),) * 2,
            milestones=((201, 400), (301, 400), (351, 400), (376, 400)),
            unused_flags=_all_but("dropRate", "widen", "columns", "dropPath", *_BATCH_NORM),
            min_size=32,
            narrowest=64,
            defaults={"dropRate": 0.0, "widen": 1.0, "LR": 0.02, "nesterov": False},
        ),
    )
}
