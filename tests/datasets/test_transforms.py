"""Test the pipelines for large images against Pillow, fb.resnet.torch's formulas and statistics."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import transforms
from helpers.sample_data import noise

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
# Of the colours of ImageNet's training images, from fb.resnet.torch.
VALUES = np.array([0.2175, 0.0188, 0.0045])
VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
SHAPES = [(300, 400), (400, 300), (256, 256), (90, 500), (511, 257)]


def normalised(image: torch.Tensor) -> torch.Tensor:
    """Normalise a transformed image as the device does."""
    return transforms.Normalise("cpu", torch.float32)(image)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(noise(1, max(height, width))[0, :height, :width])


def grey(value: int, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (value,) * 3)


def resized(image: Image.Image, side: int, resample=Image.Resampling.BICUBIC) -> np.ndarray:
    """Resize the shorter side to `side`; (H, W, 3) from 0 to 1, normalised."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((side * width // short, side * height // short), resample)
    return (np.asarray(image) / 255 - MEAN) / STD


def middle(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def five_crops(image: np.ndarray) -> np.ndarray:
    top, bottom, left, right = slice(224), slice(-224, None), slice(224), slice(-224, None)
    corners = [image[rows, columns] for rows in (top, bottom) for columns in (left, right)]
    return np.stack([*corners, middle(image, 224)])


def equal(got: torch.Tensor, wanted: np.ndarray) -> bool:
    channels_first = torch.from_numpy(np.moveaxis(wanted, -1, -3).copy())
    return got.shape == channels_first.shape and torch.allclose(
        got.double(), channels_first, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "size", "side"),
    [*((shape, 224, 256) for shape in SHAPES),
     *(((200, 300), size, side) for size, side in ((112, 128), (96, 110), (65, 74)))],
)  # fmt: skip
def test_validation_resizes_to_256_of_224_and_takes_the_centre(shape, size, side):
    image = picture(*shape)
    got = normalised(transforms.validation(size)(image))
    assert got.dtype == torch.float32
    assert equal(got, middle(resized(image, side), size))
    assert not equal(got, middle(resized(image, side - 1), size))
    bilinear = resized(image, side, Image.Resampling.BILINEAR)
    assert min(shape) == side or not equal(got, middle(bilinear, size))


@pytest.mark.parametrize("shape", [(300, 400), (90, 500)])
def test_ten_crops_are_corners_and_centre_and_all_of_them_mirrored(shape):
    image = picture(*shape)
    whole = resized(image, 256)
    got = normalised(transforms.ten_crops(224)(image))
    assert type(got) is torch.Tensor and got.shape == (10, 3, 224, 224)
    assert equal(got, np.concatenate([five_crops(whole), five_crops(whole[:, ::-1])]))
    assert not equal(got, np.concatenate([five_crops(whole), five_crops(whole[::-1])]))
    centre = normalised(transforms.validation(224)(image))
    assert torch.equal(got[4], centre) and not torch.equal(got[0], centre)


@pytest.mark.parametrize("size", [65, 224])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_training_images_have_the_size_and_without_augmentation_are_those_of_validation(
    shape, size
):
    image = picture(*shape)
    got = transforms.training(size, augment=True)(image)
    assert got.shape == (3, size, size) and got.dtype == torch.float32 and got.isfinite().all()
    plain = transforms.training(size, augment=False)(image)
    assert torch.equal(plain, transforms.validation(size)(image)) and not torch.equal(plain, got)


def test_training_images_are_normalised_on_average():
    pipeline = transforms.training(4, augment=True)
    values = torch.stack([normalised(pipeline(grey(128))).mean(dim=(1, 2)) for _ in range(400)])
    wanted = torch.tensor((128 / 255 - MEAN) / STD).float()
    error = values.std(dim=0) / 20  # of the mean of 400
    assert ((values.mean(dim=0) - wanted).abs() < 4 * error).all()
    unnormalised = torch.full((3,), 128 / 255)
    assert ((values.mean(dim=0) - unnormalised).abs() > 4 * error).any()


def test_crops_cover_8_to_100_per_cent_at_aspects_from_3_4_to_4_3():
    rows, columns = np.mgrid[0:256, 0:256]  # the colour of a pixel tells its position
    positions = Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))
    crop = transforms.training(64, augment=True).transforms[0]
    drawn = [np.asarray(crop(positions)).astype(int) for _ in range(400)]
    boxes = [[np.ptp(pixels[..., axis]) + 1 for axis in (0, 1)] for pixels in drawn]
    heights, widths = np.array(boxes, dtype=float).T
    areas, aspects = heights * widths / 256**2, widths / heights
    assert areas.min() > 0.07 and areas.max() <= 1.01
    assert areas.min() < 0.12 and areas.max() > 0.9  # both ends are reached
    assert 0.72 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.38
    assert 0.4 < np.median(areas) < 0.6  # uniform in the area, not in the side


def test_half_of_the_training_images_are_mirrored():
    slope = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    image = Image.fromarray(np.stack([slope] * 3, -1))
    pipeline = transforms.training(8, augment=True)
    drawn = [pipeline(image)[0] for _ in range(300)]
    mirrored = sum(bool(got[:, 0].mean() > got[:, -1].mean()) for got in drawn)
    assert 110 < mirrored < 190  # 150 and 4.6 deviations


def test_brightness_changes_by_up_to_four_tenths():
    pipeline = transforms.training(4, augment=True)
    (lighting,) = (part for part in pipeline.transforms if isinstance(part, transforms.Lighting))
    lighting.std = 0.0
    factors = []
    for _ in range(200):
        colours = pipeline(grey(102))  # grey stays grey under contrast and saturation
        assert torch.allclose(colours, colours.mean(), atol=1e-5)
        factors.append(colours.mean().item() / 0.4)
    assert 0.599 < min(factors) < 0.65 and 1.35 < max(factors) < 1.401


def jittered(image: Image.Image, count: int = 200) -> torch.Tensor:
    """Return (count, 3), the colour of a corner pixel of an image under the colour jitter alone."""
    jitter = transforms.v2.Compose(transforms.training(4, augment=True).transforms[1:4])
    return torch.stack([jitter(image)[:, 0, 0] for _ in range(count)])


def test_saturation_and_contrast_change_too():
    colours = jittered(Image.new("RGB", (4, 4), (150, 50, 50)))
    spread = (colours[:, 0] - colours[:, 1]) / colours.mean(dim=1)
    assert spread.max() / spread.min() > 3  # one of the two alone: at most 1.4 / 0.6
    half = Image.new("L", (4, 4), 60)
    half.paste(140, (2, 0, 4, 4))
    relative = jittered(half.convert("RGB"))[:, 0] / (60 / 255)
    assert relative.min() < 0.55 and relative.max() > 1.5  # brightness alone: 0.6 to 1.4


def covariance_of_colours(eigenvalues) -> np.ndarray:
    """Compute 0.01 P L^2 P^T, that of AlexNet's noise, p (alpha * lambda), alpha of std 0.1."""
    return 0.01 * VECTORS @ np.diag(np.square(eigenvalues)) @ VECTORS.T


def test_lighting_has_the_covariance_of_imagenets_colours():
    lighting, image = transforms.Lighting(0.1), torch.rand(3, 2, 2)
    drawn = torch.stack([lighting(image) - image for _ in range(8000)])  # (n, 3, 2, 2)
    assert torch.allclose(drawn, drawn[:, :, :1, :1].expand_as(drawn), atol=1e-6)  # one colour
    shifts = drawn[:, :, 0, 0].double().numpy().T  # (3, n)
    wanted = covariance_of_colours(VALUES)
    assert np.abs(shifts.mean(axis=1)).max() < 4 * np.sqrt(wanted.max() / 8000)
    np.testing.assert_allclose(np.cov(shifts), wanted, rtol=0.08)
    for wrong in (VALUES**0.5, VALUES[::-1]):
        assert not np.allclose(np.cov(shifts), covariance_of_colours(wrong), rtol=0.08)

    # The first component is so strong that the others hide in the covariance: take them apart.
    def deviations(vectors):
        return np.linalg.solve(vectors, shifts).std(axis=1)

    np.testing.assert_allclose(deviations(VECTORS), 0.1 * VALUES, rtol=0.06)
    assert not np.allclose(deviations(VECTORS.T), 0.1 * VALUES, rtol=0.06)  # rows for columns


def test_pipelines_can_be_sent_to_loader_processes():
    image, training = picture(20, 30), transforms.training(8, True)
    for pipeline in (training, transforms.validation(8), transforms.ten_crops(8)):
        sent = pickle.loads(pickle.dumps(pipeline))
        torch.manual_seed(1)
        here = pipeline(image)
        torch.manual_seed(1)
        assert torch.equal(sent(image), here)
