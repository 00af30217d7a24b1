"""A digest is another one after any change, and the same one elsewhere."""

from pathlib import Path

import pytest
import torch

from datasets.fingerprints import hash_files, hash_images
from datasets.memory_loader import ImageTensors


def images() -> ImageTensors:
    torch.manual_seed(0)
    return ImageTensors(
        torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8), torch.tensor([0, 1, 1, 2])
    )


def change_a_pixel(some: ImageTensors) -> ImageTensors:
    some.pixels[3, 7, 7, 2] ^= 1
    return some


def change_a_label(some: ImageTensors) -> ImageTensors:
    some.labels[0] = 1
    return some


def swap(some: ImageTensors) -> ImageTensors:
    return ImageTensors(some.pixels[[1, 0, 2, 3]], some.labels[[1, 0, 2, 3]])


def reshape(some: ImageTensors) -> ImageTensors:
    return ImageTensors(some.pixels.view(4, 4, 16, 3), some.labels)


def test_the_same_images_have_the_same_digest_however_they_lie_in_memory():
    some = images()
    apart = ImageTensors(some.pixels.repeat_interleave(2, dim=0)[::2], some.labels)
    assert not apart.pixels.is_contiguous()
    assert hash_images(some) == hash_images(images()) == hash_images(apart)


@pytest.mark.parametrize("change", [change_a_pixel, change_a_label, swap, reshape])
def test_other_images_have_another_digest(change):
    assert hash_images(change(images())) != hash_images(images())


@pytest.fixture
def samples(tmp_path) -> list[tuple[str, int]]:
    written = []
    for label, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for i in range(3):
            path = tmp_path / name / f"{i}.png"
            path.write_bytes(bytes(10))
            written.append((str(path), label))
    return written


def test_files_have_the_same_digest_in_another_place(samples, tmp_path):
    before = hash_files(samples, tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    there = [(path.replace(str(tmp_path), str(moved)), label) for path, label in samples]
    assert hash_files(there, moved) == before


def test_other_files_have_another_digest(samples, tmp_path):
    seen = {hash_files(samples, tmp_path)}
    seen.add(hash_files(samples[1:], tmp_path))
    seen.add(hash_files(samples[::-1], tmp_path))
    seen.add(hash_files([(path, 1 - label) for path, label in samples], tmp_path))
    Path(samples[0][0]).write_bytes(bytes(11))
    seen.add(hash_files(samples, tmp_path))
    Path(samples[0][0]).unlink()  # a link that dangles: its reader will say so
    seen.add(hash_files(samples, tmp_path))
    assert len(seen) == 6
