"""The networks by name: default depths, stages, and what a depth means. Loads no torch."""

# The networks, with the depth that each has unless told otherwise: CIFAR shape, ImageNet shape.
DEFAULTS = {"densenet": (100, 121), "resnet": (110, 50), "preresnet": (164, 50)}
NET_TYPES = tuple(DEFAULTS)
# Layers per block of the ImageNet networks: paper Table 1; 264 and 232 are in no table of the
# authors, see docs/parity.md.
_DENSENETS = {
    121: (6, 12, 24, 16),
    161: (6, 12, 36, 24),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
    232: (6, 12, 48, 48),
    264: (6, 12, 64, 48),
}
WIDE = (161, 232)  # DenseNets of growth rate 48 instead of 32
# Blocks per stage, as in fb.resnet.torch.
_RESNETS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
_BASIC = (18, 34)  # ResNets of two 3x3 convolutions a block instead of a bottleneck
IMAGENET_STAGES = {"densenet": _DENSENETS, "resnet": _RESNETS, "preresnet": _RESNETS}
# Layers of the CIFAR networks that are in none of their three stages.
_OUTSIDE = {"densenet": 4, "resnet": 2, "preresnet": 2}
