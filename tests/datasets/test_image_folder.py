"""Folders of images: what is listed, what is refused, small ones in memory, large ones in files."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opts
from datasets import transforms
from datasets.decode import decode
from datasets.factory import DataSplits
from datasets.image_folder import index_folder
from errors import DataError
from helpers.sample_data import create_data, noise, write_folder

CLASSES = {"cat": 5, "a dog": 3, "Ölkännchen": 4}
COUNTS = {"train": CLASSES, "val": dict.fromkeys(CLASSES, 2)}


def create(root: Path, *flags: str, size=8, workers=0, warn=pytest.fail) -> DataSplits:
    fixed = ["--dataset", "folder", "--data", str(root), "--precision", "double"]
    fixed += ["--imageSize", str(size), "--nThreads", str(workers)]
    return create_data(opts.parse([*fixed, *flags]), warn)


def refused(call, *args) -> str:
    """The one line that a person reads."""
    with pytest.raises(DataError) as error:
        call(*args)
    line = error.value.report()
    assert re.fullmatch("error: [^\n]+; fix: [^\n]+", line)
    return line


def whole(batches) -> tuple[torch.Tensor, list[int]]:
    images, targets = zip(*batches.batches(1), strict=True)
    return torch.cat(images), torch.cat(targets).tolist()


def rearranged(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).double()


# ------------------------------------------------------------------------------------------ listing


def test_classes_are_the_directories_in_order_and_images_their_files(tmp_path):
    write_folder(tmp_path, COUNTS)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "README").write_text("not a class")
    files = index_folder(tmp_path)
    assert files.classes == ["a dog", "cat", "Ölkännchen"]
    assert [label for _, label in files.train] == [0] * 3 + [1] * 5 + [2] * 4
    assert [label for _, label in files.val] == [0] * 2 + [1] * 2 + [2] * 2
    names = [files.classes[label] for _, label in files.train]
    assert [Path(path).parent.name for path, _ in files.train] == names
    assert len({path for path, _ in files.train}) == 12


def test_train_and_val_with_different_classes_are_refused(tmp_path):
    write_folder(tmp_path, {"train": {"a": 1, "b": 1, "c": 1}, "val": {"b": 1, "c": 1, "d": 1}})
    line = refused(index_folder, tmp_path)
    assert f"train and val in {tmp_path} have different classes" in line
    assert "only in train: a, only in val: d" in line
    write_folder(tmp_path, {"train": {"d": 1}, "val": {"a": 1}})
    assert index_folder(tmp_path).classes == ["a", "b", "c", "d"]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", ["nothing", "a text"])
def test_a_class_without_images_is_refused_and_named(tmp_path, split, content):
    write_folder(tmp_path, COUNTS)
    write_folder(tmp_path, {split: {"camel": 0}})
    if content == "a text":
        (tmp_path / split / "camel" / "notes.txt").write_text("no camels yet")
    line = refused(index_folder, tmp_path)
    assert str(tmp_path / split) in line and "camel" in line and "at least one image" in line


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_split_that_is_missing_or_has_no_class_is_refused(tmp_path, missing):
    other = {"train": "val", "val": "train"}[missing]
    write_folder(tmp_path, {other: CLASSES})
    assert str(tmp_path / missing) in refused(index_folder, tmp_path)
    (tmp_path / missing).mkdir()
    assert str(tmp_path / missing) in refused(index_folder, tmp_path)


@pytest.mark.parametrize("size", [8, 65])
def test_another_number_of_classes_than_the_settings_say_is_refused(tmp_path, size):
    write_folder(tmp_path, COUNTS)
    line = refused(lambda: create(tmp_path, "--nClasses", "4", size=size))
    assert "nClasses is 4 but folder has 3 classes; fix: use --nClasses 3" in line
    assert create(tmp_path, "--nClasses", "3", size=size).metadata["classes"] == sorted(CLASSES)


# --------------------------------------------------------------------------------- small: in memory


@pytest.mark.parametrize("workers", [0, 2])
def test_a_small_folder_is_decoded_once_to_the_last_pixel(tmp_path, workers):
    written = write_folder(tmp_path, COUNTS)
    data = create(tmp_path, workers=workers)
    for split in COUNTS:
        for path in (tmp_path / split).rglob("*.png"):
            path.unlink()  # decoded once: the files are needed no more
    mean, std = (
        torch.tensor(data.metadata[name]).double()[:, None, None] for name in ("mean", "std")
    )
    pixels, targets = whole(data.val)
    assert torch.allclose(pixels * std + mean, rearranged(written["val"][0]), rtol=0, atol=1e-4)
    assert targets == written["val"][1]
    held = data.train.images
    assert np.array_equal(held.pixels.numpy(), written["train"][0])
    assert held.labels.tolist() == written["train"][1]
    assert sorted(whole(data.train)[1]) == sorted(written["train"][1])


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
    # Normalised with them, the training images have mean 0 and deviation 1.
    images, _ = whole(data.train)
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-12
    assert (images.transpose(0, 1).flatten(1).std(dim=1, correction=0) - 1).abs().max() < 1e-12


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


def test_a_small_folder_names_or_skips_its_bad_images(tmp_path):
    counts = {"train": {"a": 600, "b": 500}, "val": {"a": 1, "b": 1}}
    pixels, labels = write_folder(tmp_path, counts)["train"]
    bad = tmp_path / "train" / "a" / "0300.png"
    bad.write_bytes(bad.read_bytes()[:60])
    assert str(bad) in refused(create, tmp_path)
    warned = []
    data = create(tmp_path, "--onBadImage", "skip", warn=warned.append)
    assert len(warned) == 1 and str(bad) in warned[0]
    assert data.metadata["train"] == 1099
    assert np.array_equal(data.train.images.pixels.numpy(), np.delete(pixels, 300, axis=0))
    assert data.train.images.labels.tolist() == labels[:300] + labels[301:]


# ---------------------------------------------------------------------------------- large: in files


def by_hand(paths: list[Path], transform) -> torch.Tensor:
    images = torch.stack([transform(decode(path)) for path in paths]).flatten(0, -4)
    return transforms.Normalise("cpu", torch.float64)(images)


def test_a_large_folder_is_validated_in_order_and_trained_on_in_a_shuffled_one(tmp_path):
    written = write_folder(tmp_path, COUNTS, size=70)
    data = create(tmp_path, "--batchSize", "5", size=65)
    images, targets = whole(data.val)
    paths = sorted((tmp_path / "val").rglob("*.png"))
    assert torch.equal(images, by_hand(paths, transforms.validation(65)))
    assert targets == written["val"][1]
    images, targets = whole(data.train)
    assert images.shape == (12, 3, 65, 65) and images.dtype == torch.float64
    assert sorted(targets) == written["train"][1] != targets
    assert data.metadata["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert data.metadata["std"] == pytest.approx([58.395, 57.12, 57.375])


def test_a_large_folder_holds_out_a_part_that_is_not_augmented(tmp_path):
    write_folder(tmp_path, COUNTS, size=70)
    data = create(tmp_path, "--validSize", "5", size=65)
    paths = sorted((tmp_path / "train").rglob("*.png"))
    held_out = data.metadata["held_out"]
    assert [data.metadata[split] for split in ("train", "val", "test")] == [7, 5, 6]
    wanted = by_hand([paths[i] for i in held_out], transforms.validation(65))
    assert torch.equal(whole(data.val)[0], wanted)
    tested = by_hand(sorted((tmp_path / "val").rglob("*.png")), transforms.validation(65))
    assert torch.equal(whole(data.test)[0], tested)
    # Nothing trains that is held out: without augmentation an image can be told by its pixels.
    trained = whole(create(tmp_path, "--validSize", "5", "--augment", "false", size=65).train)[0]
    kept = by_hand([path for i, path in enumerate(paths) if i not in held_out],
                   transforms.validation(65))  # fmt: skip
    mine, theirs = (sorted(images.sum(dim=(1, 2, 3)).tolist()) for images in (trained, kept))
    assert mine == pytest.approx(theirs, rel=1e-12)
    other = create(tmp_path, "--validSize", "5", "--manualSeed", "1", size=65).metadata["held_out"]
    assert other != held_out


def test_ten_crops_are_evaluated_a_tenth_of_the_batch_at_a_time(tmp_path):
    write_folder(tmp_path, COUNTS, size=80)
    data = create(tmp_path, "--batchSize", "20", "--tenCrop", "true", size=65)
    batches = list(data.val.batches(1))
    assert [(len(images), len(targets)) for images, targets in batches] == [(20, 2)] * 3
    paths = sorted((tmp_path / "val").rglob("*.png"))
    wanted = by_hand(paths, transforms.ten_crops(65))
    assert torch.equal(torch.cat([images for images, _ in batches]), wanted)
    assert len(next(data.train.batches(1))[1]) == 12  # training has no crops


def test_a_bad_image_in_a_large_folder_follows_the_settings(tmp_path):
    counts = {"train": {"a": 2, "b": 2}, "val": {"a": 2, "b": 2}}
    write_folder(tmp_path, counts, size=70)
    bad = tmp_path / "train" / "b" / "0003.png"
    bad.write_bytes(b"")
    warned = []
    for policy, shown in (("error", f"cannot read image {bad}"), ("skip", "1 of 4 images")):
        data = create(tmp_path, "--onBadImage", policy, size=65, warn=warned.append)
        assert shown in refused(list, data.train.batches(1))
        assert len(list(data.val.batches(1))) == 1  # the other split is whole
    assert len(warned) == 1 and str(bad) in warned[0]


def test_a_last_batch_of_nothing_but_skipped_images_is_left_out(tmp_path):
    write_folder(tmp_path, {"train": {"a": 1000, "b": 25}, "val": {"a": 1, "b": 1}})
    (tmp_path / "train" / "b" / "1024.png").write_bytes(b"x")
    warned = []
    data = create(tmp_path, "--onBadImage", "skip", warn=warned.append)
    assert data.metadata["train"] == 1024 and len(warned) == 1
