"""Normalise the contrast of images in memory, and whiten them, as before batch normalisation.

The constants are those of the preprocessing of maxout networks (arXiv:1302.4389), which Network in
Network, All-CNN and the first Wide ResNets took over; its authors' code is pylearn2's.
"""

from dataclasses import replace

import torch
from torch import Tensor

from datasets.memory_loader import ImageTensors

SCALE = 55.0  # Euclidean norm of an image once its contrast is normalised
ZCA_BIAS = 0.1  # added to the variances of the principal components
CHUNK = 1024  # images at a time, in float64


def preprocess(
    kind: str, train: ImageTensors, test: ImageTensors, kept: Tensor
) -> tuple[ImageTensors, ImageTensors]:
    """Return training and test images of float32 pixels.

    Args:
        kind: "gcn", global contrast normalisation; "zca", this and ZCA whitening.
        kept: indices of the training images that whitening is fitted to.
    """
    parts = [normalise_contrast(images.pixels) for images in (train, test)]
    if kind == "zca":
        mean, matrix = fit_zca(parts[0], kept)
        for part in parts:
            for chunk in part.flatten(1).split(CHUNK):
                chunk.copy_((chunk.double() - mean) @ matrix)
    return tuple(
        replace(images, pixels=part) for images, part in zip((train, test), parts, strict=True)
    )


def normalise_contrast(pixels: Tensor) -> Tensor:
    """Give each image of (N, H, W, C) mean 0 over all its values, and norm 55: float32."""
    found = torch.empty(pixels.shape)
    for target, chunk in zip(found.split(CHUNK), pixels.split(CHUNK), strict=True):
        values = chunk.flatten(1).double()
        values -= values.mean(1, keepdim=True)
        norm = values.norm(dim=1, keepdim=True)
        values *= SCALE / norm.where(norm > SCALE * 1e-8, norm.new_tensor(SCALE))
        target.copy_(values.view(target.shape))
    return found


def fit_zca(pixels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, (D,), and the symmetric matrix, (D, D), that whiten flat images, float64.

    The matrix is (C + bias I)^(-1/2), of the covariance C of some of the images, (N, H, W, C).
    """
    count, size = len(indices), pixels[0].numel()
    chunks = [pixels[part].flatten(1) for part in indices.split(CHUNK)]
    mean = sum(chunk.double().sum(0) for chunk in chunks) / count
    covariance = torch.zeros(size, size, dtype=torch.float64)
    for chunk in chunks:
        centred = chunk.double() - mean
        covariance.addmm_(centred.T, centred, alpha=1 / count)
    variances, axes = torch.linalg.eigh(covariance)
    # Of rank below D: rounding leaves variances just below 0.
    return mean, (axes * (variances.clamp(min=0) + ZCA_BIAS).rsqrt()) @ axes.T
