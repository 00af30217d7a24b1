"""Test that a fingerprint differs after any change of the data, and is the same elsewhere."""

from pathlib import Path

import torch

from datasets.fingerprints import hash_files, hash_images
from datasets.memory_loader import ImageTensors
from helpers.sample_data import noise, write_folder


def test_images_are_told_apart_by_pixels_labels_order_and_shape_only():
    pixels, labels = torch.from_numpy(noise(4, 8)), torch.tensor([0, 1, 1, 2])
    apart = pixels.repeat_interleave(2, dim=0)[::2]
    assert not apart.is_contiguous()
    assert hash_images(ImageTensors(apart, labels)) == hash_images(ImageTensors(pixels, labels))

    changed_pixel, changed_label = pixels.clone(), labels.clone()
    changed_pixel[3, 7, 7, 2] ^= 1
    changed_label[0] = 1
    swapped = [1, 0, 2, 3]
    sets = [
        (pixels, labels),
        (changed_pixel, labels),
        (pixels, changed_label),
        (pixels[swapped], labels[swapped]),
        (pixels.view(4, 4, 16, 3), labels),
    ]
    assert len({hash_images(ImageTensors(*each)) for each in sets}) == len(sets)


def test_files_are_told_apart_by_names_classes_order_and_sizes_only(tmp_path):
    root = tmp_path / "images"
    write_folder(tmp_path, {"images": {"a": 3, "b": 3}})
    samples = [(str(path), path.parent.name == "b") for path in sorted(root.rglob("*.png"))]
    before = hash_files(samples, root)
    seen = {before, hash_files(samples[1:], root), hash_files(samples[::-1], root)}
    seen.add(hash_files([(path, not label) for path, label in samples], root))

    moved = root.rename(tmp_path / "moved")
    there = [(path.replace(str(root), str(moved)), label) for path, label in samples]
    assert hash_files(there, moved) == before
    Path(there[0][0]).write_bytes(bytes(11))
    seen.add(hash_files(there, moved))
    Path(there[0][0]).unlink()  # as a dangling link: its loader will report it
    seen.add(hash_files(there, moved))
    assert len(seen) == 6
