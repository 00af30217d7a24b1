"""List image files in arrays that loader processes share, without what systems leave in folders.

Loads no torch.
"""

import functools
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from errors import DataError

# What operating systems, storage devices and archives put into directories, in lower case. Names
# that begin with a dot are hidden in any case, and what begins with ~$ is of an open Office file.
SYSTEM_NAMES = {
    "lost+found",
    "__macosx", "icon\r", "network trash folder", "temporary items",  # macOS
    "thevolumesettingsfolder",
    "$recycle.bin", "recycler", "recycled", "system volume information",  # Windows
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini",
    *(f"found.{number:03}" for number in range(1000)),  # by chkdsk
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot",  # NAS
    "@__thumb", "@synoresource",
    "__pycache__",
}  # fmt: skip
MAX_SHOWN = 5  # names or suffixes in one message


class FileList(Sequence[tuple[str, int]]):
    """Hold the path and the class number of each file, in three arrays.

    Reading an element writes to none of them, so that forked processes share their memory. Of a
    list of tuples each process would copy nearly all: reading an object counts its references.
    """

    def __init__(self, files: Iterable[tuple[str, int]]):
        paths, self._bounds, self._labels = bytearray(), array("q", [0]), array("q")
        for path, label in files:
            paths += os.fsencode(path)
            self._bounds.append(len(paths))
            self._labels.append(label)
        self._paths = bytes(paths)  # one after the other

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[str, int]:
        index = range(len(self._labels))[index]
        path = self._paths[self._bounds[index] : self._bounds[index + 1]]
        return os.fsdecode(path), self._labels[index]


def is_hidden(name: str) -> bool:
    """Tell whether a file or directory is hidden, or of a system: neither a class nor an image."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def find_image_files(directory: Path, unread: Counter[str]) -> list[str]:
    """List the image files in a directory and its subdirectories, following links.

    Args:
        unread: counts the files with another suffix, by that; hidden ones are left out silently.

    Raises:
        DataError: a directory cannot be read, or a link leads to a directory listed before.
    """

    def raise_error(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}", "check the directory") from error

    folders, seen = [], set()
    for folder, directories, names in os.walk(directory, onerror=raise_error, followlinks=True):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:  # a loop of links would never end
            raise DataError(f"{folder} is a link to a directory listed before", "remove the link")
        seen.add((info.st_dev, info.st_ino))
        directories[:] = [name for name in directories if not is_hidden(name)]
        folders.append((folder, names))
    found, suffixes = [], image_suffixes()
    for folder, names in sorted(folders):
        for name in sorted(names):
            if is_hidden(name):
                continue
            if name.lower().endswith(suffixes):
                found.append(os.path.join(folder, name))
            else:
                unread[_suffix(name)] += 1
    return found


def count_beside(split: Path, unread: Counter[str]) -> None:
    """Count the files beside the class directories of a split, which are not read, by suffix."""
    for entry in os.scandir(split):
        if not is_hidden(entry.name) and not entry.is_dir():
            unread[f"{_suffix(entry.name)} beside the class directories"] += 1


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without suffix"


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the formats that are decoded, in lower case."""
    from PIL import Image

    from datasets.decode import FORMATS

    # MPO: several JPEGs in a file, of which the decoder of JPEG reads the first.
    formats = {*FORMATS, "MPO"}
    known = Image.registered_extensions()
    return tuple(suffix for suffix, name in known.items() if name in formats)


def describe_unread(unread: Counter[str]) -> str:
    """Say how many files have which suffix: `10 .heic, 2 .txt`; the most frequent first."""
    ordered = sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    return shorten([f"{count} {suffix}" for suffix, count in ordered])


def unread_note(unread: Counter[str]) -> str:
    """Return the note about all files that are not read."""
    total = unread.total()
    return f"{total} {'file is' if total == 1 else 'files are'} not read: {describe_unread(unread)}"


def shorten(names: Sequence[str]) -> str:
    """Join the first of many names."""
    more = ", ..." if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more
