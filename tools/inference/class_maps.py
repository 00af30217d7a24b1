"""Compute class activation maps (Zhou et al., arXiv:1512.04150): which places speak for a class.

Where the mean of feature maps A over all places is classified linearly, a map is one product:

    logit[c] = mean over (y, x) of map[c](y, x) + bias[c],  map[c](y, x) = sum_k W[c, k] A_k(y, x)

Where each place is classified first (models/plain.py), its scores are the map, with the bias.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datasets.cuts import Cut
from tools.inference.network import LoadedModel


def top_classes(net: LoadedModel, images: Tensor, count: int) -> tuple[tuple, Tensor]:
    """Classify images, (n, C, H, W), by a forward pass that also gives the maps.

    Returns:
        The `count` highest scores of each image: values and class numbers, (n, count).
        The maps of these classes, (n, count, h, w) float64.
    """
    pool, classifier, inputs = net.model.global_pool, net.model.classifier, []

    def record(module: nn.Module, args: tuple[Tensor]) -> None:
        inputs.append((module, args[0].double()))

    with pool.register_forward_pre_hook(record), classifier.register_forward_pre_hook(record):
        best = net.scores(images).topk(count)
    (first, features), (_, maps) = inputs
    if first is pool:
        maps = torch.einsum("nkyx,ck->ncyx", features, classifier.weight.detach().double())
    return best, maps.take_along_dim(best.indices[..., None, None], 1)


def place(values: np.ndarray, cut: Cut, size: int, height: int, width: int) -> np.ndarray:
    """Lay a map, (h, w), over a picture that is drawn in height x width pixels.

    Args:
        cut: the window, size x size, of the resized picture over which the map is spread evenly.

    Returns:
        (height, width) float32: interpolated bilinearly, NaN outside of the window.
    """
    box = []
    for at, side, length in zip(cut.windows[0], cut.scaled, (height, width), strict=False):
        box += [at * length // side, -(-(at + size) * length // side)]
    top, bottom, left, right = box
    found, sides = np.full((height, width), np.nan, np.float32), (right - left, bottom - top)
    image = Image.fromarray(np.float32(values))
    found[top:bottom, left:right] = image.resize(sides, Image.Resampling.BILINEAR)
    return found
