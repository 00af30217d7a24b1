"""Test what is said of folders that are not train/CLASS/IMAGE and val/CLASS/IMAGE, or odd."""

import shutil
import unicodedata
from pathlib import Path

import pytest

import opts
from cli import path_checks
from datasets.folder_checks import folder_notes, layout_fix
from datasets.image_folder import index_folder
from errors import DataError
from helpers.sample_data import create_data, error_line, write_folder

TWO = {"cat": 2, "dog": 2}
BOTH = {"train": TWO, "val": TWO}


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        path_checks.check(opts.parse(["--dataset=folder", f"--data={root}"]))
    return caught.value.report()


@pytest.mark.parametrize(
    ("split", "other"),
    [("val", "valid"), ("val", "Validation"), ("val", "test"), ("train", "Train")],
)
def test_a_split_of_another_name_can_be_linked_as_the_error_says(tmp_path, split, other):
    root = tmp_path / "my data"
    write_folder(root, BOTH)
    (root / split).rename(root / other)
    line = refusal(root)
    assert f"no directory {root / split}; fix: rename {root / other} to {split}" in line
    assert line.endswith(f"ln -s {other} '{root / split}'")
    (root / split).symlink_to(other)
    path_checks.check(opts.parse(["--dataset=folder", f"--data={root}"]))


@pytest.mark.parametrize("given", [".", "a/train", "a/val/"])
def test_a_dataset_one_level_up_or_down_is_named(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "a", BOTH)
    assert refusal(Path(given)).endswith("; fix: use --data a")
    monkeypatch.chdir(tmp_path / "a" / "train")
    assert refusal(Path()).endswith("; fix: use --data ..")


def test_what_is_no_dataset_yet_is_said_with_the_next_step(tmp_path):
    (tmp_path / "a.zip").touch()
    assert "fix: unpack it" in refusal(tmp_path / "a.zip")
    write_folder(tmp_path, {"flat": TWO})
    assert f"fix: move the class directories to {tmp_path}/flat/train" in refusal(tmp_path / "flat")
    of_test = layout_fix(tmp_path / "flat", ("val",))
    assert of_test == f"move the class directories to {tmp_path}/flat/val"
    write_folder(tmp_path / "imagenet", {"train": TWO})
    shutil.copytree(tmp_path / "flat" / "cat", tmp_path / "imagenet" / "val")
    assert f"fix: sort the images in {tmp_path}/imagenet/val" in refusal(tmp_path / "imagenet")
    (tmp_path / "empty" / "other").mkdir(parents=True)
    (tmp_path / "empty" / "other" / "._a.png").touch()  # hidden: no image
    assert refusal(tmp_path / "empty").endswith("DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE")


@pytest.mark.parametrize(
    ("name", "other", "fix"),
    [
        (*(unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD")), "convmv --nfc"),
        ("Cat", "cat", "upper and lower case"),
        ("sea  lion", "sea lion ", "upper and lower case or in spaces"),
        ("cat", "dog", "give both the same class directories"),
    ],
)
def test_classes_that_look_alike_are_refused_with_what_differs(tmp_path, name, other, fix):
    write_folder(tmp_path, {"train": {"ape": 1, name: 1}, "val": {"ape": 1, other: 1}})
    assert fix in error_line(index_folder, tmp_path, pytest.fail)


def test_a_split_within_a_split_is_refused_with_the_move_that_helps(tmp_path):
    for split in BOTH:
        write_folder(tmp_path / split, {split: TWO})
    assert "fix: move the classes up: DIR/train/CLASS" in error_line(
        index_folder, tmp_path, pytest.fail
    )


@pytest.mark.parametrize("size", [8, 72])
def test_a_single_class_is_refused(tmp_path, size):
    """Compare with a loss of 0 from the first step, which torch's cross-entropy gives."""
    for split in BOTH:
        write_folder(tmp_path / split, {"images": TWO})
    opt = opts.parse(
        ["--dataset=folder", f"--data={tmp_path}", f"--imageSize={size}", "--nThreads=0"]
    )
    assert "has one class, images" in error_line(create_data, opt, pytest.fail)


@pytest.mark.parametrize(
    ("classes", "note"),
    [
        ("0 1 10 2", "10 comes before 2"),
        ("0 1 2 9", None),
        ("00 01 02 10", None),
        ("10 2 a", None),
    ],
)
def test_numbers_in_the_order_of_text_are_noted(tmp_path, classes, note):
    notes = folder_notes(tmp_path, classes.split())
    assert notes == ([f"classes are numbers, sorted as text: {note}"] if note else [])


@pytest.mark.parametrize("size", [8, 72])
@pytest.mark.parametrize("share", ["link", "copy", "one image"])
def test_images_of_train_in_val_are_noted(tmp_path, size, share):
    write_folder(tmp_path, BOTH)
    train, val = tmp_path / "train", tmp_path / "val"
    if share == "one image":
        shutil.copy(*(sorted(split.rglob("*.png"))[0] for split in (train, val)))
    else:
        shutil.rmtree(val)
        val.symlink_to("train") if share == "link" else shutil.copytree(train, val)
    opt = opts.parse(
        ["--dataset=folder", f"--data={tmp_path}", f"--imageSize={size}", "--nThreads=0"]
    )
    notes = []
    create_data(opt, notes.append)
    assert [note[:22] for note in notes] == ["val has images of trai"]
