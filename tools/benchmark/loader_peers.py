"""Prepare images as torchvision, timm and NVIDIA DALI do, on one thread of the CPU.

Each maker takes the files, the batch size, whether to augment for training, and the size of the
crop; it returns a function that prepares all files once and returns the seconds of each part, as
`loader_driver.time_epoch` does. It raises ImportError if its library is not installed.
"""

import importlib
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.registry import IMAGENET_MEAN, IMAGENET_STD
from tools.benchmark.loader_driver import Stopwatch

DALI_BATCH = 32
RESIZE = 256 / 224  # the shorter side of an evaluation image over that of its crop
Pass = Callable[[int], dict[str, tuple[float, float]]]  # epoch -> (processor, wall) seconds by part


def _prepare_all(
    paths: list[str],
    batch_size: int,
    to_bytes: Callable[[str], Tensor],
    to_floats: Callable[[Tensor], Tensor],
) -> Pass:
    """Time `to_bytes`, from path to (3, H, W) uint8, and `to_floats`, which normalises a batch."""

    def run(epoch: int) -> dict[str, tuple[float, float]]:
        watch = Stopwatch()
        torch.manual_seed(epoch)
        random.seed(epoch)  # timm draws from it
        for batch in _batches(paths, batch_size):
            with watch.part("whole"):
                with watch.part("workers"):
                    images = torch.stack([to_bytes(path) for path in batch])
                to_floats(images)
        return watch.seconds

    return run


def _batches(paths: list[str], batch_size: int) -> Iterator[list[str]]:
    return (paths[first : first + batch_size] for first in range(0, len(paths), batch_size))


def _torchvision(paths: list[str], batch_size: int, training: bool, size: int, tensors: bool):
    """Follow the presets of torchvision's reference for classification."""
    from torchvision.datasets.folder import pil_loader
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    if training:
        steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(round(size * RESIZE), antialias=True), v2.CenterCrop(size)]
    if not tensors:
        steps.append(v2.PILToTensor())
    transform = v2.Compose(steps)
    normalise = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )

    def to_bytes(path: str) -> Tensor:
        image = decode_image(path, ImageReadMode.RGB) if tensors else pil_loader(path)
        return transform(image)

    def to_floats(images: Tensor) -> Tensor:
        return torch.stack([normalise(image) for image in images])  # one by one, as it does

    return _prepare_all(paths, batch_size, to_bytes, to_floats)


def torchvision_pil(paths: list[str], batch_size: int, training: bool, size: int) -> Pass:
    """Crop, resize and mirror images of Pillow."""
    return _torchvision(paths, batch_size, training, size, tensors=False)


def torchvision_tensor(paths: list[str], batch_size: int, training: bool, size: int) -> Pass:
    """Crop, resize and mirror uint8 tensors."""
    return _torchvision(paths, batch_size, training, size, tensors=True)


def timm(paths: list[str], batch_size: int, training: bool, size: int) -> Pass:
    """Crop, resize, change the colours and mirror as timm's loader, which normalises batches."""
    from timm.data import create_transform
    from torchvision.datasets.folder import pil_loader

    transform = create_transform(
        size, training, use_prefetcher=True, color_jitter=0.4, interpolation="bicubic"
    )
    mean, std = (
        torch.tensor(value)[:, None, None] * 255 for value in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return _prepare_all(
        paths,
        batch_size,
        lambda path: torch.as_tensor(transform(pil_loader(path))),
        lambda images: images.float().sub_(mean).div_(std),
    )


def dali(paths: list[str], batch_size: int, training: bool, size: int) -> Pass:
    """Crop, resize and mirror; then also the colours and floats: two pipelines on one thread."""
    from nvidia.dali import pipeline_def

    # It decodes a whole batch before it crops: 256 images of 12 megapixels would take 9 GB.
    batch_size = min(batch_size, len(paths), DALI_BATCH)

    @pipeline_def(
        batch_size=batch_size, num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1,
        exec_async=False, exec_pipelined=False,  # or a turn would work for the next
    )  # fmt: skip
    def pipeline(as_floats: bool):
        return _dali_images(paths, training, size, as_floats)

    parts = {"workers": pipeline(as_floats=False), "whole": pipeline(as_floats=True)}
    for each in parts.values():
        each.build()

    num_batches = -(-len(paths) // batch_size)  # always full: it begins again in the last
    share = len(paths) / (num_batches * batch_size)

    def run(_: int) -> dict[str, tuple[float, float]]:
        watch = Stopwatch()
        for name, each in parts.items():
            with watch.part(name):
                for _ in range(num_batches):
                    each.run()
        return {name: (cpu * share, wall * share) for name, (cpu, wall) in watch.seconds.items()}

    return run


def _dali_images(paths: list[str], training: bool, size: int, as_floats: bool):
    """Define what a pipeline of DALI computes: bytes, or changed in colour and normalised."""
    from nvidia.dali import fn, types

    cubic, files = types.INTERP_CUBIC, fn.readers.file(files=paths)[0]
    mirror = fn.random.coin_flip() if training else 0
    if training:
        images = fn.decoders.image_random_crop(
            files, random_area=(0.08, 1), random_aspect_ratio=(3 / 4, 4 / 3)
        )
        images = fn.resize(images, size=(size, size), interp_type=cubic)
    else:
        images = fn.decoders.image(files)
        images = fn.resize(images, resize_shorter=round(size * RESIZE), interp_type=cubic)
    crop = {"crop": (size, size), "mirror": mirror}
    if not as_floats:
        keep = {"dtype": types.UINT8, "output_layout": "HWC", "mean": [0.0], "std": [1.0]}
        return fn.crop_mirror_normalize(images, **crop, **keep)
    if training:
        brightness, contrast, saturation = (fn.random.uniform(range=(0.6, 1.4)) for _ in range(3))
        images = fn.brightness_contrast(images, brightness=brightness, contrast=contrast)
        images = fn.saturation(images, saturation=saturation)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
        **crop,
    )


class Peer(NamedTuple):
    """Name a way of preparing images, and how to make it."""

    who: str
    resize: str
    module: str
    make: Callable[[list[str], int, bool, int], Pass]

    @property
    def version(self) -> str:
        """Return the version of the installed library, or raise ImportError."""
        return importlib.import_module(self.module).__version__


PEERS = (
    Peer("torchvision-pil", "bilinear", "torchvision", torchvision_pil),
    Peer("torchvision-tensor", "bilinear", "torchvision", torchvision_tensor),
    Peer("timm", "bicubic", "timm", timm),
    Peer("dali", "cubic", "nvidia.dali", dali),
)
