"""Say what is odd about a folder of images, from names alone and a few files. Loads no torch."""

import contextlib
import filecmp
import itertools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from datasets.file_list import image_suffixes, is_hidden, shorten
from errors import DataError, quoted

SPLITS = ("train", "val")
# Other names of the splits, the likeliest first.
OTHER_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "test", "testing"),
}
MAX_CLASSES, MAX_FILES = 100, 3  # files of a class that are compared between the splits


def find_class_directories(split: Path) -> list[str]:
    """List the names of the directories in a split, in the order of the class numbers.

    Raises:
        DataError: there are none, the split cannot be read, or a link in it leads nowhere.
    """
    try:
        entries = sorted(split.iterdir())
        lost = [entry for entry in entries if not (is_hidden(entry.name) or entry.exists())]
        found = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise DataError(f"cannot read {split}: {error.strerror}", "check its rights") from error
    if lost:
        raise DataError(f"{lost[0]} is a link that leads nowhere", "mend or remove the link")
    visible = [name for name in found if not is_hidden(name)]
    if not visible:
        fix = layout_fix(split.parent, (split.name,))
        hidden = f" but hidden ones: {shorten(found)}" if found else ""
        fix = "rename them, without the leading dot" if hidden else fix
        raise DataError(f"no class directories in {split}{hidden}", fix)
    return visible


def layout_fix(root: Path, splits: tuple[str, ...] = SPLITS) -> str:
    """Return how to give `root` the layout of a dataset, judging from what it holds."""
    layout = " and ".join(f"DIR/{split}/CLASS/IMAGE" for split in splits)
    if os.path.isfile(root):
        return f"unpack it, and use --data DIR with {layout}"
    found = {name.lower(): name for name in _directories(root)}
    # The dataset may be one level up or down.
    parent = Path(os.path.normpath(root / ".."))
    for directory in (parent, *(root / name for name in found.values())):
        if {*splits} <= {*_directories(directory)}:
            return f"use --data {quoted(directory)}"
    # A split may have another name, or hold no classes.
    for split in splits:
        other = next((found[name] for name in OTHER_NAMES[split] if name in found), None)
        if other and split not in found.values():
            link = f"ln -s {quoted(other)} {quoted(root / split)}"
            return f"rename {root / other} to {split}, or link it: {link}"
        if _has_images(root / split) and not _directories(root / split):
            return f"sort the images in {root / split} into a directory for each class"
    if any(_has_images(root / name) for name in found.values()):
        if splits == ("val",):
            return f"move the class directories to {root / 'val'}"
        return f"move the class directories to {root}/train, and some images of each to {root}/val"
    return f"use --data DIR with {layout}"


def spelling_fix(names: set[str], others: set[str]) -> str | None:
    """Return what to rename if two sets of class names differ in spelling only."""
    if {*map(_composed, names)} == {*map(_composed, others)}:
        forms = "the same letters in two Unicode forms, NFC of Linux and NFD of macOS"
        return f"rename them, for example with convmv --nfc: they are {forms}"
    if {*map(_folded, names)} == {*map(_folded, others)}:
        return "rename them: they differ in upper and lower case or in spaces only"
    if (names, others) == ({"train"}, {"val"}):
        return "move the classes up: DIR/train/CLASS in place of DIR/train/train/CLASS"
    return None


def folder_notes(root: Path, classes: list[str]) -> list[str]:
    """List what the user should know about the order of the classes, and about shared images."""
    notes = []
    if all(name.isdecimal() for name in classes):
        for first, second in itertools.pairwise(classes):
            if int(first) > int(second):
                notes.append(f"classes are numbers, sorted as text: {first} comes before {second}")
                break
    for path in itertools.islice(_shared_images(root, classes), 1):
        notes.append(f"val has images of train, such as {path}: its error says little")
    return notes


def _shared_images(root: Path, classes: list[str]) -> Iterator[Path]:
    """Yield images of val that train has under the same name, of the first few of each class."""
    train, val = (root / split for split in SPLITS)
    for name in classes[:: -(-len(classes) // MAX_CLASSES)]:
        with contextlib.suppress(OSError, ValueError):
            files = [file for file in sorted(os.listdir(val / name)) if not is_hidden(file)]
            for file in files[:MAX_FILES]:
                if filecmp.cmp(train / name / file, val / name / file, shallow=False):
                    yield val / name / file


def _directories(directory: Path) -> list[str]:
    with contextlib.suppress(OSError, ValueError):
        names = [name for name in sorted(os.listdir(directory)) if not is_hidden(name)]
        return [name for name in names if os.path.isdir(directory / name)]
    return []


def _has_images(directory: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        names = (name.lower() for name in os.listdir(directory) if not is_hidden(name))
        return any(name.endswith(image_suffixes()) for name in names)
    return False


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return " ".join(_composed(name).casefold().split())
