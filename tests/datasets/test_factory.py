"""From the settings to the splits of a run, for every dataset; digits and synthetic images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import opts
from datasets.digits import digits
from datasets.factory import DataSplits
from datasets.registry import DATASETS
from datasets.synthetic import synthetic
from distributed.launcher import ProcessInfo
from errors import DataError
from helpers.sample_data import create_data, noise, write_cifar, write_folder, write_svhn

HERE = Path()


def create(*flags: str, rank: int = 0, size: int = 1) -> DataSplits:
    opt = opts.parse([*flags, "--nThreads", "0"], world_size=size)
    return create_data(opt, process=ProcessInfo(rank, size))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a small version of a dataset; its flags and (train, val, test, classes, size)."""

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


@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_gives_its_splits_classes_and_type(written, name, precision):
    flags, (train, val, test, num_classes, size) = written(name)
    data = create(*flags, "--precision", precision)
    assert [data.metadata[key] for key in ("train", "val", "test")] == [train, val, test]
    assert data.metadata["classes"] == data.classes and len(set(data.classes)) == num_classes
    assert len(data.metadata["mean"]) == len(data.metadata["std"]) == 3
    for split, batches in (("train", data.train), ("val", data.val), ("test", data.test)):
        if batches is None:
            assert split == "test" and test is None
            continue
        counted = 0
        for images, targets in batches.batches(1):
            counted += len(targets)
            assert images.shape == (len(targets), 3, size, size)
            assert images.dtype == (torch.float64 if precision == "double" else torch.float32)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert targets.dtype == torch.int64
            assert targets.min() >= 0 and targets.max() < num_classes
        assert counted == batches.sampler.num_images == data.metadata[split]


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_refuses_another_number_of_classes(written, name):
    flags, (*_, num_classes, _) = written(name)
    create(*flags, "--nClasses", str(num_classes))
    if name == "synthetic":  # has as many as it is told
        return
    with pytest.raises(DataError) as error:
        create(*flags, "--nClasses", str(num_classes + 1))
    assert error.value.report() == (
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
    assert data.metadata["held_out"] == sorted(set(data.metadata["held_out"]))
    indices = [*data.train.sampler.indices.tolist(), *data.val.sampler.indices.tolist()]
    assert sorted(indices) == list(range(train))
    assert data.val.sampler.indices.tolist() == data.metadata["held_out"]
    with pytest.raises(DataError, match=f"validSize {train} of {train} training images"):
        create(*flags, "--validSize", str(train))


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_replicas_share_batches_in_training_and_take_turns_in_evaluation(written, name):
    flags, (_, val, *_, size) = written(name)
    flags += ["--batchSize", "3"]
    alone = create(*flags)
    replicas = [create(*flags, rank=rank, size=3) for rank in range(3)]
    assert all(data.metadata == alone.metadata for data in replicas)
    steps = zip(*(data.train.batches(2) for data in replicas), strict=True)
    for (images, targets), parts in zip(alone.train.batches(2), steps, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
        assert all(part[0].shape[1:] == (3, size, size) for part in parts)
    in_turn = [batch for step in zip(*(data.val.batches(2) for data in replicas), strict=True)
               for batch in step]  # fmt: skip
    counts = [len(targets) for _, targets in in_turn]
    assert counts == ([3, 1, 0] if val == 4 else [3, 3, 3, 3, 0, 0])
    for (images, targets), mine in zip(alone.val.batches(2), in_turn, strict=False):
        assert torch.equal(mine[0], images) and torch.equal(mine[1], targets)


@pytest.mark.parametrize(("name", "pad"), [("cifar10", 4), ("folder", 2), ("digits", 1)])
@pytest.mark.parametrize("augment", [True, False])
def test_images_shift_by_up_to_an_eighth_if_they_are_augmented(written, name, pad, augment):
    flags, _ = written(name)
    data = create(*flags, "--augment", str(augment).lower())
    borders = set()
    for epoch in range(1, 40):
        for images, _ in data.train.batches(epoch):
            empty = (images == 0).all(dim=1)  # (n, H, W): the mean colour, which no pixel has
            borders |= set(empty.all(dim=2).sum(dim=1).tolist())
        if name == "digits":
            break
    assert borders == set(range(pad + 1) if augment else {0})


# ------------------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns_with_every_fifth_for_the_test():
    data, source = digits(HERE), load_digits()
    is_test = np.arange(1797) % 5 == 0
    for part, chosen in ((data.train, ~is_test), (data.test, is_test)):
        assert part.labels.tolist() == source.target[chosen].tolist()
        wanted = np.round(source.images[chosen] / 16 * 255)
        for channel in range(3):
            assert np.array_equal(part.pixels[..., channel].numpy(), wanted)
    assert (len(data.train.labels), len(data.test.labels)) == (1437, 360)
    assert data.classes == list("0123456789")


def test_digits_have_every_class_in_both_parts_and_their_own_statistics():
    data, made = digits(HERE), create("--dataset", "digits")
    for part in (data.train, data.test):
        assert torch.bincount(part.labels).min() > 0.07 * len(part.labels)
    values = data.train.pixels.double().flatten(0, 2)
    assert made.metadata["mean"] == pytest.approx(values.mean(dim=0).tolist(), rel=1e-12)
    assert made.metadata["std"] == pytest.approx(
        values.std(dim=0, correction=0).tolist(), rel=1e-12
    )


def test_digits_are_never_mirrored():
    assert not any_is_mirrored(create("--dataset", "digits", "--augment", "true"), pad=1)
    # The twin, of a set whose images may be mirrored.
    flags = ["--dataset", "synthetic", "--imageSize", "8", "--nImages", "200"]
    assert any_is_mirrored(create(*flags), pad=1)


def any_is_mirrored(data: DataSplits, pad: int) -> bool:
    """Whether the inner part of a training image is that of a mirrored original only."""
    mean, std = (torch.tensor(data.metadata[key])[:, None, None] for key in ("mean", "std"))
    originals = data.train.images.pixels.permute(0, 3, 1, 2)
    size = originals.shape[-1] - 2 * pad

    def inner(images, dy, dx):
        return images[:, :, dy : dy + size, dx : dx + size]

    shifts = [(dy, dx) for dy in range(2 * pad + 1) for dx in range(2 * pad + 1)]
    known, mirrored = (
        {part.numpy().tobytes() for dy, dx in shifts for part in inner(images, dy, dx).contiguous()}
        for images in (originals, originals.flip(-1))
    )
    for images, _ in data.train.batches(1):
        pixels = (images * std + mean).round().to(torch.uint8)
        found = {part.numpy().tobytes() for part in inner(pixels, pad, pad).contiguous()}
        if found & (mirrored - known):
            return True
        assert found <= known
    return False


# ---------------------------------------------------------------------------------------- synthetic


def test_synthetic_images_have_the_numbers_that_are_asked_for():
    data = synthetic(1100, 7, 12, seed=0)
    assert data.train.pixels.shape == (1100, 12, 12, 3) and data.test.pixels.shape[0] == 220
    assert data.train.pixels.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert set(data.train.labels.tolist()) == set(range(7)) and len(set(data.classes)) == 7
    assert len(synthetic(3, 2, 4, seed=0).test.labels) == 1  # never none


def test_synthetic_images_belong_to_their_seed():
    first, again, other = (synthetic(40, 3, 8, seed) for seed in (0, 0, 1))
    for part in ("train", "test"):
        mine, same, others = (getattr(data, part) for data in (first, again, other))
        assert torch.equal(mine.pixels, same.pixels) and torch.equal(mine.labels, same.labels)
        assert not torch.equal(mine.pixels, others.pixels)
    assert not torch.equal(first.train.pixels[:8], first.test.pixels)


def test_synthetic_classes_can_be_learnt_from_the_training_images():
    data = synthetic(400, 10, 8, seed=0)
    train, test = (part.pixels.double().flatten(1) for part in (data.train, data.test))
    means = torch.stack([train[data.train.labels == label].mean(dim=0) for label in range(10)])
    nearest = torch.cdist(test, means).argmin(dim=1)
    assert (nearest == data.test.labels).double().mean() > 0.99
    shuffled = data.test.labels[torch.randperm(len(nearest))]
    assert (nearest == shuffled).double().mean() < 0.3
