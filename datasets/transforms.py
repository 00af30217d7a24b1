"""Transform images above 64 pixels as fb.resnet.torch does, with torchvision.transforms.v2.

Workers transform single images; `Normalise` works on a whole batch on the device.
"""

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from datasets.registry import IMAGENET_MEAN, IMAGENET_STD

# Principal components of the colours of ImageNet's training pixels.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
BICUBIC = v2.InterpolationMode.BICUBIC
RESIZE = 256 / 224  # the shorter side of a validation image over that of its crop


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
    """Augment for training: PIL image -> (3, size, size), from 0 to 1."""
    if not augment:
        return validation(size)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1), (3 / 4, 4 / 3), interpolation=BICUBIC),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            # Parity: brightness, contrast and saturation in random order.
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            Lighting(0.1),
            v2.RandomHorizontalFlip(),
        ]
    )


def validation(size: int) -> v2.Compose:
    """Resize to 256/224 of `size`, crop the centre: PIL image -> (3, size, size) uint8."""
    return v2.Compose([_resize(size), v2.CenterCrop(size), v2.ToImage()])


def ten_crops(size: int) -> v2.Compose:
    """Crop corners and centre, and mirror them: PIL image -> (10, 3, size, size) uint8."""
    return v2.Compose([_resize(size), v2.ToImage(), v2.TenCrop(size), torch.stack])


class Normalise:
    """Map (N, 3, H, W), uint8 or floats from 0 to 1, to mean 0 and std 1 on ImageNet."""

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
