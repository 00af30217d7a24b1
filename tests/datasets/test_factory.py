"""Test the splits that settings give, for every dataset; digits and synthetic images."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import opts
from datasets.digits import digits
from datasets.factory import DataSplits
from datasets.memory_loader import Augmentation
from datasets.registry import DATASETS
from datasets.synthetic import synthetic
from distributed.launcher import ProcessInfo
from helpers.sample_data import (
    create_data,
    error_line,
    noise,
    write_cifar,
    write_folder,
    write_svhn,
)

# As in fb.resnet.torch, and SVHN's pixels divided by 255.
STATISTICS = {
    "cifar10": ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
    "cifar100": ([129.3, 124.1, 112.4], [68.2, 65.4, 70.4]),
    "svhn": ([0, 0, 0], [255, 255, 255]),
}


def create(*flags: str, rank: int = 0, size: int = 1) -> DataSplits:
    opt = opts.parse([*flags, "--nThreads", "0"], world_size=size)
    return create_data(opt, process=ProcessInfo(rank, size))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a small version of a dataset; return flags and (train, val, test, classes, size)."""

    def write(name: str) -> tuple[list[str], tuple]:
        root = ["--dataset", name, "--data", str(tmp_path)]
        labels = [3, 1, 4, 1, 5, 9, 2, 6]
        parts = (noise(8), labels), (noise(4), labels[:4])
        if name in ("cifar10", "cifar100"):
            write_cifar(tmp_path, monkeypatch, name, *parts)
            return root, (8, 4, None, DATASETS[name].num_classes, 32)
        if name == "svhn":
            files = dict(zip(("train", "test", "extra"), [*parts, parts[0]], strict=True))
            write_svhn(tmp_path, monkeypatch, files)
            return [*root, "--validSize", "3"], (13, 3, 4, 10, 32)
        if name == "digits":
            return root, (1437, 360, None, 10, 8)
        if name == "synthetic":
            return [*root, "--nImages", "50"], (50, 10, None, 10, 32)
        size = 70 if name == "imagenet" else 16
        counts = dict.fromkeys("abc", 4)
        write_folder(tmp_path, {"train": counts, "val": counts}, size)
        return [*root, "--imageSize", str(size)], (12, 12, None, 3, size)

    return write


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_gives_its_splits_classes_type_and_statistics(written, name):
    flags, (train, val, test, num_classes, size) = written(name)
    data = create(*flags, "--precision", "double")
    metadata = data.metadata
    assert [metadata[key] for key in ("train", "val", "test")] == [train, val, test]
    assert metadata["classes"] == data.classes and len(set(data.classes)) == num_classes
    statistics = metadata["mean"], metadata["std"]
    assert statistics == STATISTICS.get(name, statistics)
    assert (data.test is None) == (test is None)
    for split in ("train", "val", "test")[: 3 if test else 2]:
        loader = getattr(data, split)
        labels = []
        for images, targets in loader.batches(1):
            labels += targets.tolist()
            assert images.shape == (len(targets), 3, size, size) and images.dtype == torch.float64
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert targets.dtype == torch.int64
        assert len(labels) == loader.sampler.num_images == metadata[split]
        assert min(labels) >= 0 and max(labels) < num_classes


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_refuses_another_number_of_classes(written, name):
    flags, (*_, num_classes, _) = written(name)
    create(*flags, "--nClasses", str(num_classes))
    if name == "synthetic":  # has as many as --nClasses says
        return
    assert error_line(create, *flags, "--nClasses", str(num_classes + 1)) == (
        f"error: nClasses is {num_classes + 1} but {name} has {num_classes} classes; "
        f"fix: use --nClasses {num_classes} or leave it out"
    )


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_repeats_itself_for_a_seed(written, name):
    flags, _ = written(name)

    def first(seed):
        return next(create(*flags, "--manualSeed", seed).train.batches(1))[0]

    assert torch.equal(first("1"), first("1"))
    assert not torch.equal(first("1"), first("2"))


@pytest.mark.parametrize("name", ["cifar10", "folder", "digits", "synthetic", "imagenet"])
def test_a_part_that_is_held_out_is_recorded_and_never_trains(written, name):
    flags, (train, val, *_) = written(name)
    data = create(*flags, "--validSize", "5")
    assert [data.metadata[key] for key in ("train", "val", "test")] == [train - 5, 5, val]
    held_out = data.metadata["held_out"]
    assert held_out == sorted(set(held_out)) == data.val.sampler.indices.tolist()
    assert sorted([*data.train.sampler.indices.tolist(), *held_out]) == list(range(train))
    line = error_line(create, *flags, "--validSize", str(train))
    assert f"validSize {train} of {train} training images" in line


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_ranks_share_batches_in_training_and_take_turns_in_evaluation(written, name):
    flags, (_, val, *_, size) = written(name)
    flags += ["--batchSize", "3"]
    alone = create(*flags)
    ranks = [create(*flags, rank=rank, size=3) for rank in range(3)]
    assert all(data.metadata == alone.metadata for data in ranks)
    steps = zip(*(data.train.batches(2) for data in ranks), strict=True)
    for (images, targets), parts in zip(alone.train.batches(2), steps, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
        assert all(part[0].shape[1:] == (3, size, size) for part in parts)
    steps = zip(*(data.val.batches(2) for data in ranks), strict=True)
    in_turn = [batch for step in steps for batch in step]
    counts = [len(targets) for _, targets in in_turn]
    assert counts == ([3, 1, 0] if val == 4 else [3, 3, 3, 3, 0, 0])
    for (images, targets), found in zip(alone.val.batches(2), in_turn, strict=False):
        assert torch.equal(found[0], images) and torch.equal(found[1], targets)


@pytest.mark.parametrize(("name", "pad", "flip"), [
    ("cifar10", 4, True), ("folder", 2, True), ("synthetic", 4, True),
    ("svhn", 4, False), ("digits", 1, False),  # a mirrored digit may be no digit
])  # fmt: skip
def test_images_shift_by_an_eighth_and_digits_are_never_mirrored(written, name, pad, flip):
    flags, _ = written(name)
    assert create(*flags, "--augment", "true").train.augmentation == Augmentation(pad, flip)
    assert create(*flags, "--augment", "false").train.augmentation is None
    assert (create(*flags).train.augmentation is not None) == flip  # the default
    assert create(*flags, "--augment", "true").val.augmentation is None


# 16 pixels: in memory. 65: from files.
@pytest.mark.parametrize("size", ["16", "65"])
def test_a_remark_about_both_splits_is_noted_once_and_exif_rotate_turns_both(tmp_path, size):
    pixels = np.kron(noise(1, 3)[0], np.ones((30, 30, 1), np.uint8))
    for turned in (False, True):  # the same picture, stored on its side
        exif = Image.Exif()
        exif[0x0112] = 3 if turned else 1
        for split, name in itertools.product(("train", "val"), "ab"):
            path = tmp_path / f"{turned}" / split / name / f"{split}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels[::-1, ::-1] if turned else pixels).save(path, exif=exif)

    def load(turned: bool, rotate: str) -> tuple[list, list[str]]:
        flags = ["--dataset", "folder", "--data", str(tmp_path / f"{turned}"), "--imageSize", size]
        more = ["--augment", "false", "--nThreads", "0", "--exifRotate", rotate]
        warned = []
        data = create_data(opts.parse([*flags, *more]), warned.append)
        images = [next(part.batches(1))[0] for part in (data.train, data.val)]
        for part in (data.train, data.val):
            list(part.batches(1))
        return images, warned

    upright, _ = load(False, "false")
    stored, warned = load(True, "false")
    assert not any(torch.equal(a, b) for a, b in zip(upright, stored, strict=True))
    assert len(warned) == 1 and "--exifRotate true" in warned[0] and ".png" in warned[0]
    found, warned = load(True, "true")
    assert all(torch.equal(a, b) for a, b in zip(upright, found, strict=True)) and warned == []


@pytest.mark.parametrize("size", ["16", "65"])
def test_the_flags_for_large_and_narrow_images_reach_the_loaders(tmp_path, size):
    write_folder(tmp_path, {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}}, 80)
    flags = ["--dataset", "folder", "--data", str(tmp_path), "--imageSize", size]

    def load(*more: str) -> None:
        list(create(*flags, *more).val.batches(1))

    load("--maxPixels", "6400")
    assert "6400 pixels" not in error_line(load, "--maxPixels", "6399")
    Image.new("RGB", (300, 2)).save(tmp_path / "val" / "a" / "0000.png")
    assert "--maxAspect 150" in error_line(load)
    load("--maxAspect", "150")


@pytest.mark.parametrize("size", ["16", "65"])
@pytest.mark.parametrize("count", [3, 80])
def test_a_training_set_of_one_colour_is_refused_and_of_a_constant_channel_noted(
    tmp_path, size, count
):
    write_folder(tmp_path, {"train": {"a": count, "b": 3}, "val": {"a": 1, "b": 1}}, 4)
    paths = sorted((tmp_path / "train").rglob("*.png"))
    flags = ["--dataset", "folder", "--data", str(tmp_path), "--imageSize", size]
    opt, notes = opts.parse([*flags, "--nThreads", "0"]), []
    for path in paths:
        Image.new("RGB", (80, 80), (255, 255, 255)).save(path)
    shown = f"all pixels of all {count + 3} training images are (255, 255, 255)"
    assert f"no channel varies: {shown}" in error_line(create_data, opt)
    Image.new("RGB", (80, 80), (1, 255, 2)).save(paths[-2])  # a single one differs, not in green
    create_data(opt, notes.append)
    assert len(notes) == 1 and notes[0].endswith(" training images have the same green")
    Image.new("RGB", (80, 80), (1, 3, 2)).save(paths[0])
    create_data(opt)
    if size == "65":  # an image that cannot be read does not hide the rest
        paths[0].write_bytes(b"x")
        create_data(opt, notes.append)
        assert len(notes) == 2 and notes[1].endswith(
            f"of {count + 3} training images have the same green"
        )


def test_digits_are_scikit_learns_with_every_fifth_for_the_test():
    data, source = digits(Path()), load_digits()
    is_test = np.arange(1797) % 5 == 0
    for split, mask in ((data.train, ~is_test), (data.test, is_test)):
        assert split.labels.tolist() == source.target[mask].tolist()
        assert torch.bincount(split.labels).min() > 0.07 * len(split.labels)
        wanted = np.round(source.images[mask] / 16 * 255)
        for channel in range(3):
            assert np.array_equal(split.pixels[..., channel].numpy(), wanted)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == list("0123456789")


def test_synthetic_images_have_the_numbers_asked_for_and_belong_to_their_seed():
    first, again, other = (synthetic(1100, 7, 12, seed) for seed in (0, 0, 1))
    assert first.train.pixels.shape == (1100, 12, 12, 3) and len(first.test) == 220
    assert first.train.pixels.dtype == torch.uint8 and first.train.labels.dtype == torch.int64
    assert set(first.train.labels.tolist()) == set(range(7)) and len(set(first.classes)) == 7
    assert len(synthetic(3, 2, 4, seed=0).test) == 1  # never none
    for split in ("train", "test"):
        want, same, others = (getattr(data, split) for data in (first, again, other))
        assert torch.equal(want.pixels, same.pixels) and torch.equal(want.labels, same.labels)
        assert not torch.equal(want.pixels, others.pixels)
    assert not torch.equal(first.train.pixels[:220], first.test.pixels)


def test_synthetic_classes_can_be_learnt_from_the_training_images():
    data = synthetic(400, 10, 8, seed=0)
    train, test = (part.pixels.double().flatten(1) for part in (data.train, data.test))
    means = torch.stack([train[data.train.labels == label].mean(dim=0) for label in range(10)])
    nearest = torch.cdist(test, means).argmin(dim=1)
    assert (nearest == data.test.labels).double().mean() > 0.99
    shuffled = data.test.labels[torch.randperm(len(nearest))]
    assert (nearest == shuffled).double().mean() < 0.3
