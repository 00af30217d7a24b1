"""For images above 64 pixels: the pipelines of fb.resnet.torch in torchvision.transforms.v2.

What needs no random numbers and no single image, from bytes to normalised numbers, is left to
`Normalise`: on the device, for a whole batch.
"""

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from datasets.registry import IMAGENET_MEAN, IMAGENET_STD

# Of the colours of ImageNet's training pixels.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
BICUBIC = v2.InterpolationMode.BICUBIC
RESIZE = 256 / 224  # validation images are this much larger than the crop


class Lighting(nn.Module):
    """Add a random multiple of the principal components of ImageNet's colours (AlexNet's noise).

    (..., 3, H, W) -> the same shape.
    """

    def __init__(self, std: float):
        super().__init__()
        self.std = std
        self.components = torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES)  # (3, 3)

    def forward(self, image: Tensor) -> Tensor:
        """Shift all pixels by one colour."""
        shift = self.components @ (torch.randn(3) * self.std)  # (3,)
        return image + shift[:, None, None]


def training(size: int, augment: bool) -> v2.Compose:
    """PIL image -> (3, size, size) from 0 to 1: random area and aspect, colours, mirror."""
    if not augment:
        return validation(size)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size,
                scale=(0.08, 1),
                ratio=(3 / 4, 4 / 3),
                interpolation=BICUBIC,
            ),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            # Brightness, contrast and saturation in random order, as there.
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            Lighting(0.1),
            v2.RandomHorizontalFlip(),
        ]
    )


def validation(size: int) -> v2.Compose:
    """PIL image -> (3, size, size) uint8: the centre of the image resized to 256/224 of it."""
    return v2.Compose([_resize(size), v2.CenterCrop(size), v2.ToImage()])


def ten_crops(size: int) -> v2.Compose:
    """PIL image -> (10, 3, size, size) uint8: corners, centre, and all of them mirrored."""
    return v2.Compose([_resize(size), v2.ToImage(), v2.TenCrop(size), torch.stack])


class Normalise:
    """(N, 3, H, W) of bytes, or of numbers from 0 to 1, -> mean 0 and std 1 on ImageNet."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.mean, self.std = (
            torch.tensor(value, dtype=dtype, device=device)[:, None, None]
            for value in (IMAGENET_MEAN, IMAGENET_STD)
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch."""
        scale = 1 if images.is_floating_point() else 255
        return (images.to(self.mean.dtype) / scale - self.mean) / self.std


def _resize(size: int) -> v2.Resize:
    return v2.Resize(round(size * RESIZE), interpolation=BICUBIC)
