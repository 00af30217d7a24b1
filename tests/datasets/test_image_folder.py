"""Test folders of images: listed and refused files, small ones in memory, large ones in files."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import opts
from cli import path_checks
from datasets import factory, file_loader
from datasets.decode import decode
from datasets.factory import DataSplits
from datasets.image_folder import index_folder
from datasets.registry import IMAGENET_MEAN, IMAGENET_STD
from errors import CheckpointError
from helpers.sample_data import create_data, error_line, noise, read_all, write_folder

CLASSES = {"cat": 5, "a dog": 3, "Ölkännchen": 4}
COUNTS = {"train": CLASSES, "val": dict.fromkeys(CLASSES, 2)}


def settings(root: Path, *flags: str, size=8, workers=0):
    fixed = ["--dataset", "folder", "--data", str(root), "--precision", "double"]
    return opts.parse([*fixed, "--imageSize", str(size), "--nThreads", str(workers), *flags])


def create(root: Path, *flags: str, warn=pytest.fail, statistics=None, **more) -> DataSplits:
    return create_data(settings(root, *flags, **more), warn, statistics=statistics)


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.png"))


# Listing:
def test_classes_are_the_directories_in_order_and_images_their_files(tmp_path):
    write_folder(tmp_path, COUNTS)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "val" / "cat" / "more").mkdir()
    (tmp_path / "val" / "cat" / "more" / "a.heic").write_text("not read")
    (tmp_path / "train" / "README").write_text("not a class")
    (tmp_path / "train" / ".listing").write_text("hidden")
    for split in COUNTS:
        shutil.copy(files(tmp_path / split)[0], tmp_path / split)  # an image, of no class
    notes = []
    index = index_folder(tmp_path, notes.append)
    beside = "beside the class directories"
    assert notes == [  # one note about both splits
        f"5 files are not read: 2 .png {beside}, 1 .heic, 1 .txt, 1 without suffix {beside}"
    ]
    assert index.classes == ["a dog", "cat", "Ölkännchen"]
    assert [label for _, label in index.train] == [0] * 3 + [1] * 5 + [2] * 4
    assert [label for _, label in index.val] == [0] * 2 + [1] * 2 + [2] * 2
    paths = sorted((tmp_path / "train").glob("*/*.png"))
    assert [path for path, _ in index.train] == [str(path) for path in paths]


@pytest.mark.parametrize("target", ["gone", "camel"])  # the second leads to itself
def test_a_class_that_is_a_link_to_nowhere_is_refused(tmp_path, target):
    write_folder(tmp_path, COUNTS)
    (tmp_path / "train" / ".DS_Store").symlink_to("gone")  # hidden: no matter
    index_folder(tmp_path, pytest.fail)
    (tmp_path / "val" / "camel").symlink_to(target)
    line = error_line(index_folder, tmp_path, pytest.fail)
    assert f"{tmp_path}/val/camel is a link that leads nowhere" in line


def test_train_and_val_with_different_classes_are_refused(tmp_path):
    write_folder(tmp_path, {"train": {"a": 1, "b": 1, "c": 1}, "val": {"b": 1, "c": 1, "d": 1}})
    line = error_line(index_folder, tmp_path, pytest.fail)
    assert f"train and val in {tmp_path} have different classes" in line
    assert "only in train: a, only in val: d" in line
    write_folder(tmp_path, {"train": {"d": 1}, "val": {"a": 1}})
    assert index_folder(tmp_path, pytest.fail).classes == ["a", "b", "c", "d"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_images_is_refused_and_named(tmp_path, split):
    write_folder(tmp_path, {other: CLASSES for other in COUNTS if other != split})
    for _ in range(2):  # no directory, then one without classes
        assert str(tmp_path / split) in error_line(index_folder, tmp_path, pytest.fail)
        (tmp_path / split).mkdir(exist_ok=True)
    write_folder(tmp_path, {other: {"camel": other != split} for other in COUNTS})
    write_folder(tmp_path, {split: CLASSES})
    for name, shown in (
        (None, "class camel;"),
        ("._a.png", "class camel;"),
        ("notes.txt", "class camel (1 .txt);"),
        ("a.HEIC", "class camel (1 .heic, 1 .txt);"),
        ("a", "class camel (1 .heic, 1 .txt, 1 without suffix);"),
    ):
        if name:
            (tmp_path / split / "camel" / name).write_text("no camels yet")
        line = error_line(index_folder, tmp_path, pytest.fail)
        assert (
            str(tmp_path / split) in line and shown in line and "with a suffix such as .jpg" in line
        )


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "lost+found", "$Recycle.Bin"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_hidden_and_system_directories_are_neither_classes_nor_images(tmp_path, name, split):
    write_folder(tmp_path, COUNTS)

    def listed() -> tuple:
        index = index_folder(tmp_path, pytest.fail)
        return list(index.train), list(index.val), index.classes

    wanted = listed()
    for parent in (tmp_path / split, tmp_path / split / "cat"):
        (parent / name).mkdir()  # an empty one
        assert listed() == wanted
        shutil.copy(files(tmp_path / split / "cat")[0], parent / name)
        assert listed() == wanted


def test_the_folder_that_is_named_may_be_hidden_but_its_classes_may_not(tmp_path):
    root = tmp_path / ".data" / "@eaDir"
    write_folder(root, COUNTS)
    assert len(index_folder(root, pytest.fail).train) == 12
    path_checks.check(settings(root))
    for path in [*root.glob("*/*")]:
        path.rename(path.with_name(f".{path.name}"))
    line = error_line(path_checks.check, settings(root))
    assert f"no class directories in {root}/train but hidden ones: .a dog, .cat, " in line
    assert line.endswith("; fix: rename them, without the leading dot")


# Small: in memory:
@pytest.mark.parametrize("workers", [0, 2])
def test_a_small_folder_is_decoded_once_to_the_last_pixel(tmp_path, workers):
    written = write_folder(tmp_path, COUNTS)
    data = create(tmp_path, workers=workers)
    for path in files(tmp_path):
        path.unlink()  # decoded once: the files are needed no more
    mean, std = (torch.tensor(data.metadata[name]).double() for name in ("mean", "std"))
    pixels, targets = read_all(data.val)
    found = pixels.permute(0, 2, 3, 1) * std + mean
    assert torch.allclose(found, torch.from_numpy(written["val"][0]).double(), rtol=0, atol=1e-4)
    assert targets == written["val"][1]
    held = data.train.images
    assert np.array_equal(held.pixels.numpy(), written["train"][0])
    assert held.labels.tolist() == written["train"][1] == sorted(read_all(data.train)[1])


@pytest.mark.parametrize("valid", [0, 4])
def test_statistics_are_those_of_the_images_that_train(tmp_path, valid):
    pixels, _ = write_folder(tmp_path, COUNTS)["train"]
    data = create(tmp_path, "--validSize", str(valid), "--augment", "false")
    held_out = data.metadata["held_out"]
    kept = np.delete(pixels, held_out, axis=0).reshape(-1, 3).astype(np.float64)
    assert len(held_out) == valid
    np.testing.assert_allclose(data.metadata["mean"], kept.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(data.metadata["std"], kept.std(axis=0), rtol=1e-12)
    everything = pixels.reshape(-1, 3).mean(axis=0)
    assert np.allclose(data.metadata["mean"], everything, rtol=1e-12) == (valid == 0)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16), (5, 7), (8, 30)])
def test_other_sizes_are_resized_at_the_shorter_side_and_cut_at_the_centre(tmp_path, shape):
    write_folder(tmp_path, COUNTS)
    height, width = shape
    image = Image.fromarray(noise(1, 32, seed=9)[0, :height, :width])
    image.save(tmp_path / "val" / "a dog" / "0000.png")
    pixels = create(tmp_path).val.images.pixels[0].numpy()
    scale = 8 / min(shape)
    height, width = round(height * scale), round(width * scale)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 8) // 2, (width - 8) // 2
    assert np.array_equal(pixels, resized[top : top + 8, left : left + 8])
    squeezed = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels, squeezed) == (height == width)


def test_a_small_folder_names_or_skips_its_bad_images(tmp_path, monkeypatch):
    counts = {"train": {"a": 200, "b": 57}, "val": {"a": 1, "b": 1}}
    pixels, labels = write_folder(tmp_path, counts)["train"]
    bad = [100, 256]  # the last is a batch of its own, of which nothing is left
    for number in bad:
        files(tmp_path / "train")[number].write_bytes(b"x")
    assert str(files(tmp_path / "train")[100]) in error_line(create, tmp_path)
    monkeypatch.setattr(file_loader, "MAX_SKIPPED_FRACTION", 0.01)
    warned = []
    data = create(tmp_path, "--onBadImage", "skip", warn=warned.append)
    assert len(warned) == 2 and data.metadata["train"] == 255
    assert np.array_equal(data.train.images.pixels.numpy(), np.delete(pixels, bad, axis=0))
    assert data.train.images.labels.tolist() == np.delete(labels, bad).tolist()


# Large: in files:
def by_hand(paths: list[Path], ten_crops: bool = False) -> torch.Tensor:
    """Prepare images for validation with torchvision's transforms of tensors."""
    crop = v2.TenCrop(65) if ten_crops else v2.CenterCrop(65)
    resized = [
        tv.resize(tv.pil_to_tensor(decode(path)[0]), 74, v2.InterpolationMode.BICUBIC)
        for path in paths
    ]
    crops = [torch.stack([*(crop(image) if ten_crops else [crop(image)])]) for image in resized]
    mean, std = (
        torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return tv.normalize(torch.cat(crops).double() / 255, mean, std)


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=0, atol=1e-12)


def test_a_large_folder_is_validated_in_order_and_trained_on_in_a_shuffled_one(tmp_path):
    written = write_folder(tmp_path, COUNTS, size=70)
    data = create(tmp_path, "--batchSize", "5", size=65)
    images, targets = read_all(data.val)
    assert close(images, by_hand(files(tmp_path / "val")))
    assert targets == written["val"][1]
    images, targets = read_all(data.train)
    assert images.shape == (12, 3, 65, 65) and images.dtype == torch.float64
    assert sorted(targets) == written["train"][1] != targets
    assert data.metadata["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert data.metadata["std"] == pytest.approx([58.395, 57.12, 57.375])


def test_a_large_folder_holds_out_a_part_that_is_not_augmented(tmp_path):
    write_folder(tmp_path, COUNTS, size=70)
    data = create(tmp_path, "--validSize", "5", size=65)
    paths = files(tmp_path / "train")
    held_out = data.metadata["held_out"]
    assert close(read_all(data.val)[0], by_hand([paths[i] for i in held_out]))
    assert close(read_all(data.test)[0], by_hand(files(tmp_path / "val")))
    # No held-out image trains: without augmentation an image can be told by its pixels.
    trained, _ = read_all(create(tmp_path, "--validSize", "5", "--augment", "false", size=65).train)
    kept = by_hand([path for i, path in enumerate(paths) if i not in held_out])
    found, expected = (sorted(images.sum(dim=(1, 2, 3)).tolist()) for images in (trained, kept))
    assert found == pytest.approx(expected, rel=1e-12)
    other = create(tmp_path, "--validSize", "5", "--manualSeed", "1", size=65).metadata["held_out"]
    assert other != held_out


def test_ten_crops_are_evaluated_a_tenth_of_the_batch_at_a_time(tmp_path):
    write_folder(tmp_path, COUNTS, size=80)
    data = create(tmp_path, "--batchSize", "20", "--tenCrop", "true", size=65)
    batches = list(data.val.batches(1))
    assert [(len(images), len(targets)) for images, targets in batches] == [(20, 2)] * 3
    wanted = by_hand(files(tmp_path / "val"), ten_crops=True)
    assert close(torch.cat([images for images, _ in batches]), wanted)
    assert len(next(data.train.batches(1))[1]) == 12  # training has no crops


@pytest.mark.parametrize("size", [8, 65])
def test_a_trained_network_reads_its_test_images_only_and_with_its_own_statistics(tmp_path, size):
    write_folder(tmp_path, COUNTS, size=70)
    statistics = ((10.0, 20.0, 30.0), (40.0, 50.0, 60.0))
    flags = "--testOnly", "true", "--resume", str(tmp_path)
    data = create(tmp_path, *flags, size=size, statistics=statistics)
    assert data.train is None
    assert data.metadata["mean"] == [10, 20, 30]
    samples = [(str(path), number) for number, path in enumerate(files(tmp_path / "val"))]
    unreadable = file_loader.UnreadableImages("error", 6, pytest.fail)
    opt = settings(tmp_path, size=size)
    loader = factory.evaluation_loader(
        opt, samples, torch.device("cpu"), statistics, unreadable, torch.float64
    )
    images, numbers = read_all(loader)
    assert torch.equal(images, read_all(data.val)[0]) and numbers == list(range(6))


@pytest.mark.parametrize("size", [8, 65])
def test_a_test_set_that_lacks_classes_has_the_class_numbers_of_the_run(tmp_path, size):
    write_folder(tmp_path, {"val": {"b": 2, "d": 1, "empty": 0}}, size=70)
    statistics, notes, classes = ((1.0,) * 3, (2.0,) * 3), [], ["d", "c", "empty", "b"]
    flags = "--testOnly", "true", "--resume", str(tmp_path)
    path_checks.check(settings(tmp_path, *flags, size=size))

    def read(*more: str):
        opt = settings(tmp_path, *flags, *more, size=size)
        return create_data(opt, notes.append, statistics=statistics, classes=classes)

    data = read("--nClasses", "4")
    assert sorted(read_all(data.val)[1]) == [0, 3, 3] and data.classes == classes
    assert notes == [f"{tmp_path / 'val'} has no images of 2 of the run's 4 classes: c, empty"]
    assert "nClasses is 2 but folder has 4 classes" in error_line(read, "--nClasses", "2")
    write_folder(tmp_path, {"val": {"e": 1}})
    line = error_line(read, of=CheckpointError)
    assert f"not the run's: {tmp_path / 'val'} has e; fix: " in line and "d, c, empty, b" in line
    (tmp_path / "val" / "e").rename(tmp_path / "val" / "c")
    (tmp_path / "val" / "c" / "0000.png").rename(tmp_path / "val" / "c" / "0000.heic")
    assert "no images in class c (1 .heic)" in error_line(read)
    classes = None  # not known: those of the test set, of which none may be empty
    assert "no images in class c (1 .heic), empty" in error_line(read)


def test_a_tool_turns_images_as_the_run_did(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(noise(1, 65)[0]).save(path, exif=exif)
    statistics = ((0.0,) * 3, (1.0,) * 3)
    read = {}
    for rotate in ("false", "true"):
        opt = settings(tmp_path, "--exifRotate", rotate, size=8)
        unreadable = file_loader.UnreadableImages("error", 1, lambda _: None)
        loader = factory.evaluation_loader(
            opt, [(str(path), 0)], torch.device("cpu"), statistics, unreadable
        )
        read[rotate] = read_all(loader)[0]
    turned = read["false"].rot90(-1, (2, 3))
    assert (read["true"] - turned).abs().max() <= 1  # resizing rounds in another order
    assert (read["true"] - read["false"]).abs().max() > 9


def test_more_loader_processes_than_cores_are_noted_once(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    write_folder(tmp_path, COUNTS)
    warned = []
    assert create(tmp_path, workers=2, warn=warned.append).metadata["train"] == 12
    assert len(warned) == 1 and warned[0].startswith("nThreads 2 is more than the 1 cores")
    assert [str(warning.message) for warning in recwarn] == []  # torch has one for each split
