"""Test in-memory batches: order, augmentation and statistics against plain references."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

from datasets.batch_sampler import BatchSampler
from datasets.memory_loader import Augmentation, ImageTensors, MemoryLoader, channel_statistics
from helpers.sample_data import error_line, noise, same_batches

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
PAD = 4
CROPS = [(dy, dx, mirror) for mirror in (0, 1) for dy in range(9) for dx in range(9)]


def numbered(count: int, size: int = 8) -> ImageTensors:
    """Make images whose label is their number."""
    return ImageTensors(torch.from_numpy(noise(count, size)), torch.arange(count))


def loader(images: ImageTensors, indices=None, seed=None, batch_size=16, **more) -> MemoryLoader:
    indices = torch.arange(len(images.labels)) if indices is None else torch.tensor(indices)
    settings = {"mean": MEAN, "std": STD, "dtype": torch.float64}
    return MemoryLoader(images, BatchSampler(indices, batch_size, seed), **settings | more)


def augmented(images: ImageTensors, flip: bool = True, **more) -> MemoryLoader:
    return loader(images, **{"seed": 0, "augmentation": Augmentation(PAD, flip)} | more)


def labels_of(batches) -> list[int]:
    return torch.cat([targets for _, targets in batches]).tolist()


def pixels_of(batches) -> torch.Tensor:
    return torch.cat([images for images, _ in batches])


def normalised(pixels: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    """Normalise by torchvision: (H, W, 3) uint8 -> (3, H, W)."""
    return tv.normalize(pixels.permute(2, 0, 1).to(dtype), list(MEAN), list(STD))


def exact(image: torch.Tensor) -> bytes:
    """Make a key to find an image among many; + 0 makes -0 the zero that it equals."""
    return (image + 0.0).contiguous().numpy().tobytes()


def crop(image: torch.Tensor, dy: int, dx: int, mirror: int) -> torch.Tensor:
    """Augment one normalised image as the paper does: mirror, pad with zeros, crop."""
    size = image.shape[-1]
    image = image.flip(-1) if mirror else image
    return F.pad(image, (PAD,) * 4)[:, dy : dy + size, dx : dx + size]


def padded_first(pixels: torch.Tensor, dy: int, dx: int, mirror: int) -> torch.Tensor:
    """Augment as many ports do instead: black borders, then normalise."""
    black = crop(pixels.permute(2, 0, 1), dy, dx, mirror)
    return normalised(black.permute(1, 2, 0))


def test_order_and_crops_belong_to_seed_epoch_and_step_and_to_nothing_else():
    images = numbered(50)

    def epoch(seed=5, number=2, start=0):
        torch.rand(3)  # other draws of the process make no difference
        list(augmented(images, seed=1).batches(1))
        return list(augmented(images, seed=seed).batches(number, start))

    wanted, state = epoch(), torch.get_rng_state()
    list(augmented(images).batches(1))
    assert torch.equal(torch.get_rng_state(), state)  # the network's draws are left alone
    for start in (0, 1, 3, 4):
        assert same_batches(epoch(start=start), wanted[start:])
    for other in (epoch(seed=6), epoch(number=3)):
        assert labels_of(other) != labels_of(wanted)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 2}, {"step": 1}])
def test_crops_belong_to_seed_epoch_and_step(changed):
    # All images are one, so that only the offsets can differ.
    one = ImageTensors(torch.from_numpy(noise(1)).expand(32, -1, -1, -1), torch.zeros(32).long())

    def batch(seed=0, epoch=1, step=0):
        return next(augmented(one, seed=seed).batches(epoch, step))[0]

    assert torch.equal(batch(), batch())
    assert not torch.equal(batch(), batch(**changed))


def test_evaluation_counts_every_image_once_and_in_order():
    indices = [4, 2, 30, 9, 17]
    images = numbered(40)
    batches = list(loader(images, indices, batch_size=2).batches(1))
    assert [len(targets) for _, targets in batches] == [2, 2, 1]
    assert labels_of(batches) == indices
    wanted = torch.stack([normalised(images.pixels[i]) for i in indices])
    assert torch.equal(pixels_of(batches), wanted)
    assert torch.equal(pixels_of(loader(images, indices).batches(2)), wanted)


def test_augmentation_is_normalise_mirror_pad_and_crop_image_by_image():
    images = numbered(64)
    drawn = Counter()
    for batch, labels in augmented(images).batches(1):
        for got, label in zip(batch, labels, strict=True):
            pixels = images.pixels[label]
            image = normalised(pixels)
            found = [which for which in CROPS if torch.equal(got, crop(image, *which))]
            assert len(found) == 1, "none of the 162 crops, or several"
            drawn[found[0]] += 1
            # The twin agrees only where no border is seen.
            dy, dx, _ = found[0]
            assert torch.equal(got, padded_first(pixels, *found[0])) == (dy == dx == PAD)
    assert len(drawn) > 40


@pytest.mark.parametrize("flip", [True, False])
def test_all_81_offsets_and_both_mirrors_are_equally_frequent(flip):
    per_crop = 60
    crops = CROPS if flip else CROPS[:81]
    picture = torch.from_numpy(noise(1, 8))
    one = ImageTensors(picture, torch.zeros(1).long())
    image = normalised(picture[0])
    named = {exact(crop(image, *which)): which for which in CROPS}
    assert len(named) == 162
    batches = augmented(one, flip, indices=[0] * (per_crop * len(crops)), batch_size=500)
    drawn = Counter(named.get(exact(image)) for image in pixels_of(batches.batches(1)))
    assert set(drawn) == set(crops)  # without flip: no mirrored one

    def chi_square(counts):
        return sum((count - per_crop) ** 2 / per_crop for count in counts)

    limit = len(crops) + 5 * (2 * len(crops)) ** 0.5  # mean and 5 deviations of the distribution
    assert chi_square(drawn.values()) < limit
    # The twin: half the images unmirrored or unmoved would be seen.
    assert chi_square([per_crop * 1.5] * 40 + [per_crop * 0.5] * (len(crops) - 40)) > limit


@pytest.mark.parametrize("augmentation", [None, Augmentation(2, True)])
def test_batches_are_channels_last_and_computed_in_their_type(augmentation):
    def first(dtype):
        batches = loader(numbered(20), seed=0, augmentation=augmentation, dtype=dtype)
        return next(batches.batches(1))[0]

    single, double = first(torch.float32), first(torch.float64)
    for batch, dtype in ((single, torch.float32), (double, torch.float64)):
        assert batch.shape == (16, 3, 8, 8) and batch.dtype == dtype
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert not batch.is_contiguous()
    assert torch.allclose(single.double(), double, atol=1e-6)
    assert not torch.equal(single.double(), double)  # not single converted afterwards


def statistics(pixels: np.ndarray, indices: torch.Tensor, warn=pytest.fail) -> tuple:
    return channel_statistics(torch.from_numpy(pixels), indices, warn)


def test_channel_statistics_are_those_of_numpy_in_double():
    pixels = noise(9000, size=2)  # several parts of what is summed at once
    pixels[..., 1] //= 3
    indices = np.arange(0, 9000, 2)
    pixels[1::2] = 0  # what is not chosen must not count
    mean, std = statistics(pixels, torch.from_numpy(indices))
    values = pixels[indices].reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-12)
    everything, _ = statistics(pixels, torch.arange(9000))
    assert not np.allclose(everything, mean, rtol=0.1)


def test_a_channel_without_contrast_is_divided_by_one_and_noted():
    pixels, warned = noise(5), []
    pixels[..., 2] = 201
    mean, std = statistics(pixels, torch.arange(5), warned.append)
    assert mean[2] == 201 and std[2] == 1 and min(std[:2]) > 50
    assert warned == ["all pixels of all 5 training images have the same blue"]


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 20, 30)])
def test_a_training_set_of_one_colour_is_refused(colour):
    pixels = noise(5)
    pixels[:4] = colour  # the last is held out
    line = error_line(statistics, pixels, torch.arange(4))
    shown = ", ".join(map(str, colour))
    assert line.startswith(
        f"error: no channel varies: all pixels of all 4 training images are ({shown})"
    )
