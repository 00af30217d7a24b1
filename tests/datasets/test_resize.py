"""Test both resizes against restatements in float64, torchvision and Pillow."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from datasets.cuts import Cut, Window, centre_crop, random_sized_crop, ten_crops
from datasets.regions import Box
from datasets.resize import Packed, antialias, pack, torch7
from helpers import fb_resnet

BICUBIC = v2.InterpolationMode.BICUBIC
GREY_LEVEL = 1e-3  # how far Torch7's pixels may be off
# Of boxes: larger than the output, smaller, one to three pixels high, square, and equal to it.
BOXES = [(331, 287), (1500, 230), (40, 53), (70, 500), (1, 90), (2, 300), (3, 81), (90, 1),
         (150, 150), (224, 224), (224, 300), (5, 224)]  # fmt: skip
PICTURES = [(375, 500), (500, 375), (480, 640), (341, 512), (256, 301), (300, 257), (256, 256),
            (120, 97), (90, 500), (74, 149)]  # fmt: skip


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Make (H, W, 3) uint8 of smooth shapes on the left, noise on the right, and sharp edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = 128 + 60 * np.sin(x / 9 + y / 17) + 60 * np.cos(x * y / 900)
    pixels = np.stack([waves, waves[::-1], 255 * ((x // 7 + y // 5) % 2)], axis=-1)
    pixels[:, width // 2 :] = rng.integers(0, 256, pixels[:, width // 2 :].shape)
    return pixels.astype(np.uint8)


def whole(height: int, width: int, scaled: tuple[int, int] | None = None) -> Cut:
    """Resize a whole box, and see all of it."""
    return Cut(Box(0, 0, width, height), scaled or (height, width), (Window(0, 0),))


def boxed(pixels: np.ndarray, cut: Cut) -> np.ndarray:
    left, top, width, height = cut.box
    return pixels[top : top + height, left : left + width]


def by_torch7(pixels: np.ndarray, cut: Cut, size: int) -> np.ndarray:
    got = torch7(pack(boxed(pixels, cut), cut, size), size)
    assert got.shape == (len(cut.windows), 3, size, size) and got.dtype == torch.float32
    return got.movedim(1, -1).double().numpy()


def by_antialias(pixels: np.ndarray, cut: Cut, size: int) -> torch.Tensor:
    got = antialias(boxed(pixels, cut), cut.box[:1:-1], cut, size)
    assert got.shape == (len(cut.windows), size, size, 3) and got.dtype == torch.uint8
    return got.int()


def channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.movedim(-3, -1).int()


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    return np.abs(got - wanted).max()


@pytest.mark.parametrize("size", [65, 224])
@pytest.mark.parametrize("shape", BOXES)
def test_torch7_crops_are_those_of_its_rules(shape, size):
    pixels = picture(*shape)
    got = by_torch7(pixels, whole(*shape, (size, size)), size)[0]
    assert error(got, fb_resnet.resize(pixels, size, size)) < GREY_LEVEL


@pytest.mark.parametrize(
    "rule",
    [{"a": -0.75},
     {"place": lambda i, length, count: (i + 0.5) * length / count - 0.5},
     {"place": lambda i, length, count: i * length / count},
     {"straight": False}],
    ids=["a = -0.75", "pixel centres", "left edges", "clamped edges"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(200, 310), (40, 53)])
def test_torch7_crops_are_not_those_of_other_rules(shape, rule):
    pixels = picture(*shape)
    got = by_torch7(pixels, whole(*shape, (224, 224)), 224)[0]
    assert error(got, fb_resnet.resize(pixels, 224, 224, **rule)) > 1


def test_torch7_keeps_values_beyond_black_and_white():
    got = by_torch7(picture(100, 100), whole(100, 100, (224, 224)), 224)
    assert got.min() < -5 and got.max() > 260 and (got != got.round()).any()


@pytest.mark.parametrize("size", [65, 224])
@pytest.mark.parametrize("shape", PICTURES)
def test_torch7_evaluates_the_centre_of_the_scaled_picture(shape, size):
    pixels = picture(*shape)
    scaled = fb_resnet.scale(pixels, round(size * 256 / 224))
    got = by_torch7(pixels, centre_crop(*shape[::-1], size, "torch7"), size)[0]
    assert error(got, fb_resnet.centre_crop(scaled, size)) < GREY_LEVEL


@pytest.mark.parametrize("width", [257, 259])
def test_torch7s_centre_begins_at_the_upper_whole_number(width):
    """Tell apart ceil and round: half to even, where 33 / 2 is rounded down and 35 / 2 up."""
    pixels = picture(256, width)
    got = by_torch7(pixels, centre_crop(width, 256, 224, "torch7"), 224)[0]
    assert error(got, pixels[16:240, math.ceil((width - 224) / 2) :][:, :224]) < GREY_LEVEL
    differ = round((width - 224) / 2) != math.ceil((width - 224) / 2)
    rounded = fb_resnet.centre_crop(pixels, 224, start=round)
    assert differ == (width == 257) == (error(got, rounded) > 1)


def as_a_set(crops: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Put ten crops, whose order has no effect, in the order of others."""
    crops = crops.astype(np.float64)
    return np.stack([min(crops, key=lambda crop: np.abs(crop - one).mean()) for one in like])


@pytest.mark.parametrize("shape", PICTURES)
def test_torch7s_ten_crops_are_those_of_the_picture_and_of_its_mirror_image(shape):
    pixels = picture(*shape)
    wanted = fb_resnet.ten_crops(fb_resnet.scale(pixels, 110), 96)
    got = by_torch7(pixels, ten_crops(*shape[::-1], 96, "torch7"), 96)
    assert error(as_a_set(got, like=wanted), wanted) < GREY_LEVEL
    assert error(as_a_set(wanted, like=got), got) < GREY_LEVEL
    mirrored_later = np.concatenate([wanted[:5], wanted[:5, :, ::-1]])
    scaled_width = fb_resnet.scaled_size(*shape, 110)[1]
    is_apart = error(as_a_set(got, like=mirrored_later), mirrored_later) > 1
    assert is_apart == (scaled_width % 2 == 1)  # its centre begins one pixel off


def test_torch7_resizes_pictures_of_many_sizes_in_one_go():
    cuts = [(picture(*shape), ten_crops(*shape[::-1], 96, "torch7")) for shape in PICTURES]
    packed = Packed(*map(torch.cat, zip(*(pack(*one, 96) for one in cuts), strict=True)))
    alone = torch.cat([torch7(pack(*one, 96), 96) for one in cuts])
    assert torch.equal(torch7(packed, 96), alone)


@pytest.mark.parametrize("resize", ["torch7", "antialias"])
@pytest.mark.parametrize("shape", [(900, 100), (100, 1400), (70, 500), (65, 333)])
def test_a_crop_that_never_fits_is_the_centre_of_the_scaled_picture(shape, resize):
    """Draw ten times the whole area, at an aspect that the picture has not."""
    pixels, size = picture(*shape), 65
    cut = random_sized_crop(*shape[::-1], size, np.full(64, 1 - 2.0**-53), resize)
    if resize == "torch7":
        scaled = fb_resnet.scale(pixels, size)
        got = by_torch7(pixels, cut, size)[0]
        assert error(got, fb_resnet.centre_crop(scaled, size)) < GREY_LEVEL
    else:
        assert torch.equal(by_antialias(pixels, cut, size)[0], by_torchvision(pixels, size, size))


def by_torchvision(pixels: np.ndarray, shorter: int, size: int) -> torch.Tensor:
    image = torch.from_numpy(pixels).movedim(-1, 0)
    scaled = functional.resize(image, [shorter], BICUBIC, antialias=True)
    return channels_last(functional.center_crop(scaled, [size]))


@pytest.mark.parametrize("size", [65, 112, 224])
@pytest.mark.parametrize("shape", PICTURES)
def test_antialias_evaluates_torchvisions_centre(shape, size):
    pixels = picture(*shape)
    got = by_antialias(pixels, centre_crop(*shape[::-1], size, "antialias"), size)[0]
    assert torch.equal(got, by_torchvision(pixels, round(size * 256 / 224), size))


@pytest.mark.parametrize("shape", PICTURES)
def test_antialias_takes_torchvisions_ten_crops(shape):
    pixels = picture(*shape)
    image = torch.from_numpy(pixels).movedim(-1, 0)
    scaled = functional.resize(image, [110], BICUBIC, antialias=True)
    wanted = channels_last(torch.stack(functional.ten_crop(scaled, [96]))).numpy()
    got = by_antialias(pixels, ten_crops(*shape[::-1], 96, "antialias"), 96).numpy()
    assert error(as_a_set(got, like=wanted), wanted) == 0
    assert error(as_a_set(wanted, like=got), got) == 0


CROPS = [(0, 0, 500, 375), (31, 17, 224, 224), (100, 3, 300, 225), (499, 374, 1, 1),
         (7, 300, 400, 75), (250, 0, 71, 375), (0, 0, 83, 2)]  # fmt: skip


@pytest.mark.parametrize("box", CROPS)
def test_antialias_crops_for_training_as_torchvision(box):
    left, top, width, height = box
    pixels = picture(375, 500)
    image = torch.from_numpy(pixels).movedim(-1, 0)
    place = (top, left, height, width)
    wanted = functional.resized_crop(image, *place, [224, 224], BICUBIC, antialias=True)
    got = by_antialias(pixels, Cut(Box(*box), (224, 224), (Window(0, 0),)), 224)[0]
    assert torch.equal(got, channels_last(wanted))


@pytest.mark.parametrize("box", CROPS)
def test_antialias_is_within_two_levels_of_pillow_whatever_its_order_of_passes(box):
    """Resize rows and columns apart, so that Pillow's order, which 13.0 changed, has no say."""
    left, top, width, height = box
    pixels = picture(375, 500)[top : top + height, left : left + width]
    image = Image.fromarray(pixels).resize((224, height), Image.Resampling.BICUBIC)
    wanted = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    got = by_antialias(pixels, whole(height, width, (224, 224)), 224)[0].numpy()
    assert error(got, wanted) <= 2


def antialiased_matrix(length: int, extent: float, count: int) -> np.ndarray:
    """Build (count, length), bicubic with anti-aliasing: `extent` of `length` pixels to `count`."""
    step = extent / count
    reach = max(step, 1.0)
    centres = (np.arange(count)[:, None] + 0.5) * step
    distances = np.abs(np.arange(length) + 0.5 - centres) / reach
    weights = np.vectorize(fb_resnet.cubic)(distances, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def antialiased(pixels: np.ndarray, extent: tuple[float, float], scaled: tuple[int, int]):
    rows, columns = map(antialiased_matrix, pixels.shape[:2], extent, scaled)
    across = (columns @ pixels.astype(float)).clip(0, 255)  # there are bytes between the passes
    return np.tensordot(rows, across, 1).clip(0, 255)


@pytest.mark.parametrize(
    ("extent", "scaled"),
    [((370.5, 500), (256, 345)), ((300, 370.5), (224, 224)), ((97, 80.5), (224, 224)),
     ((370.5, 281.25), (256, 256)), ((226.125, 240.875), (224, 224)), ((71, 80.5), (224, 224)),
     ((80.25, 107), (224, 256)), ((224.5, 224.5), (224, 224)), ((33.125, 257), (65, 65))],
)  # fmt: skip
def test_a_picture_decoded_at_a_reduced_size_is_resized_from_its_true_size(extent, scaled):
    """Half of 741 pixels is 370.5: the last of 371 decoded pixels lies half beyond the edge."""
    pixels = picture(*map(math.ceil, extent))
    cut = Cut(Box(0, 0, *(round(8 * side) for side in extent[::-1])), scaled, (Window(0, 0),))
    size = min(scaled)
    got = antialias(pixels, extent, cut, size)
    assert got.shape == (1, size, size, 3)
    got = got[0].numpy().astype(float)
    assert error(got, antialiased(pixels, extent, scaled)[:size, :size]) <= 1.1
    ignored = antialiased(pixels, pixels.shape[:2], scaled)[:size, :size]
    assert error(got, ignored) > 4
