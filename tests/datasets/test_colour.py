"""Test the colours of training images against fb.resnet.torch's steps, one after the other."""

import itertools

import numpy as np
import pytest
import torch

from datasets.colour import Augment, Normalise, colour_draws
from datasets.draws import uniforms
from datasets.registry import DATASETS
from helpers import fb_resnet

STATISTICS = DATASETS["imagenet"].statistics_at(224)
ORDERS = list(itertools.permutations(range(3)))
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}  # of standard deviations


def augment(images: torch.Tensor, draws: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    return Augment(STATISTICS, "cpu", dtype)(images.clone(), draws)  # it overwrites them


def images_of(count: int, size: int = 65, dtype=torch.uint8, seed: int = 0) -> torch.Tensor:
    """Make (n, 3, size, size) of a colour cast that differs from image to image."""
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.uniform(-20, 275, (2, count, 3, 1, 1)), axis=0)
    values = rng.uniform(low, high, (count, 3, size, size))
    if dtype == torch.uint8:
        values = values.clip(0, 255).round()
    return torch.from_numpy(values).to(dtype)


def draws_of(count: int, seed: int = 0) -> torch.Tensor:
    return colour_draws(uniforms(seed, epoch=1, first=0, count=count))


def step_by_step(image: torch.Tensor, draws: torch.Tensor, **more) -> np.ndarray:
    """Augment one image (3, H, W) with its row of draws, by the restatement; (3, H, W)."""
    draws = draws.double().numpy()
    pixels = image.double().movedim(0, -1).numpy() / 255
    order = tuple(draws[3:6].astype(int))
    assert sorted(order) == [0, 1, 2]
    result = fb_resnet.augment_colours(
        pixels, tuple(draws[:3]), order, draws[6:9], bool(draws[9]), **more
    )
    return np.moveaxis(result, -1, 0)


def differences(images: torch.Tensor, draws: torch.Tensor, dtype, **more) -> list[float]:
    got = augment(images, draws, dtype)
    assert got.shape == images.shape and got.dtype == dtype
    wanted = [step_by_step(*one, **more) for one in zip(images, draws, strict=True)]
    return [np.abs(a.double().numpy() - b).max() for a, b in zip(got, wanted, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_training_images_have_fb_resnets_colours_in_all_orders(pixels, dtype):
    images, draws = images_of(60, dtype=pixels), draws_of(60)
    assert {tuple(steps) for steps in draws[:, 3:6].int().tolist()} == set(ORDERS)
    assert set(draws[:, 9].tolist()) == {0, 1}
    # Torch7's pixels are floats, and their rows are summed as such.
    tolerance = TOLERANCE[dtype] if pixels == torch.uint8 else max(TOLERANCE[dtype], 1e-7)
    assert max(differences(images, draws, dtype)) < tolerance


def test_the_order_of_the_steps_has_no_effect_because_nothing_is_clamped():
    """Brightness has no constant, and saturation keeps greys: all six orders give one result."""
    images, draws = images_of(1).repeat(6, 1, 1, 1), draws_of(1).repeat(6, 1)
    draws[:, :3] = draws.new_tensor([0.7, 1.3, 0.6])
    draws[:, 3:6] = draws.new_tensor(ORDERS)
    draws[:, 6:] = 0
    got = augment(images, draws, torch.float64)
    torch.testing.assert_close(got, got[:1].expand_as(got), rtol=0, atol=1e-12)

    def clamp(image: np.ndarray) -> np.ndarray:
        return image.clip(0, 1)

    clamped = [step_by_step(images[0], row, after_step=clamp) for row in draws]
    assert np.ptp(clamped, axis=0).max() > 0.1


def test_colours_are_not_clamped():
    images, draws = images_of(60), draws_of(60)
    clamped = differences(images, draws, torch.float64, after_step=lambda image: image.clip(0, 1))
    assert max(clamped) > 0.1
    black, white = -np.array(STATISTICS[0]), 255 - np.array(STATISTICS[0])
    colours = augment(images, draws) * torch.tensor(STATISTICS[1])[:, None, None]
    colours = colours.movedim(1, -1).numpy()
    assert (colours < black - 1).any() and (colours > white + 1).any()


@pytest.mark.parametrize("channel", range(3))
def test_lighting_is_a_sum_of_the_principal_components(channel):
    """Turn everything else off: one component alone shifts all pixels by its colour."""
    images, draws = images_of(1), draws_of(1)
    draws[:, :3], draws[:, 6:], draws[:, 6 + channel] = 1, 0, 0.1
    plain = Normalise(STATISTICS, "cpu", torch.float64)(images)
    shift = (augment(images, draws, torch.float64) - plain)[0]
    component = 0.1 * fb_resnet.EIGENVALUES[channel] * fb_resnet.EIGENVECTORS[:, channel]
    wanted = torch.from_numpy(component / fb_resnet.STD)[:, None, None].expand_as(shift)
    torch.testing.assert_close(shift, wanted, rtol=0, atol=1e-12)


def test_a_mirrored_image_is_the_other_one_from_right_to_left():
    images, draws = images_of(2), draws_of(1).repeat(2, 1)
    images[1], draws[:, 9] = images[0], draws.new_tensor([0, 1])
    plain, mirrored = augment(images, draws, torch.float64)
    torch.testing.assert_close(mirrored, plain.flip(-1), rtol=0, atol=1e-12)
    assert not torch.allclose(mirrored, plain, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_evaluated_images_are_normalised_only(pixels, dtype):
    images = images_of(3, dtype=pixels)
    got = Normalise(STATISTICS, "cpu", dtype)(images)
    colours = images.double().movedim(1, -1).numpy() / 255
    wanted = torch.from_numpy((colours - fb_resnet.MEAN) / fb_resnet.STD).movedim(-1, 1)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.fixture
def threads():
    """Set the number of threads, and put back what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [65, 97, 224])
def test_an_image_is_the_same_to_the_last_bit_in_any_batch(size, pixels, layout, threads):
    images, draws = images_of(23, size, pixels).to(memory_format=layout), draws_of(23)
    threads(1)
    whole = augment(images, draws)
    for count in (1, 2, 3, 4):
        threads(count)
        assert torch.equal(augment(images, draws), whole)
        for step in (1, 2, 5):
            parts = zip(images.split(step), draws.split(step), strict=True)
            assert torch.equal(torch.cat([augment(*part) for part in parts]), whole)
