"""Find the images to run a network on, and check where results go."""

import os
import sys
from pathlib import Path

from cli.flag_types import Flag, boolean
from errors import DataError, StorageError, UsageError

OVERWRITE = Flag("overwrite", boolean, False, "replace an output file that is there", const="true")


class Unreadable:
    """Says which images cannot be read, a line each, and lets the others go on."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, reason: str) -> None:
        """Report one."""
        self.count += 1
        error = DataError(f"cannot read image {reason}", "replace or remove the file")
        print(error.report(), file=sys.stderr)

    def sync(self) -> None:
        """At the end of a pass: there is no other process to compare with."""

    @property
    def code(self) -> int:
        """The exit code of a tool that has gone on without them."""
        return DataError.code if self.count else 0


def check_images(operands: list[str]) -> None:
    """Raise DataError when a file or directory is not there, before anything is loaded."""
    for operand in operands:
        if not os.path.exists(operand):
            raise DataError(f"no such file or directory: {operand}", "name images or directories")


def find_images(operands: list[str]) -> list[str]:
    """The files that are named, and the image files in the directories that are, in order.

    Raises:
        DataError: one is not there, or a directory has no image.
    """
    check_images(operands)

    from datasets.image_folder import find_image_files

    paths = []
    for operand in operands:
        found = find_image_files(Path(operand)) if os.path.isdir(operand) else [operand]
        if not found:
            raise DataError(f"no images in {operand}", "name images or directories of them")
        paths += found
    return paths


def check_new(path: Path, overwrite: bool) -> None:
    """Raise an error when `path` cannot become an output file; write nothing.

    Raises:
        UsageError: it is there and may not be replaced.
        StorageError: it cannot be written.
    """
    if path.exists() and not (overwrite and path.is_file()):
        if path.is_file():
            raise UsageError(f"{path} is there", "name another, or add --overwrite true")
        raise UsageError(f"{path} is no file", "name another")
    if not path.parent.is_dir():
        raise StorageError(f"no directory {path.parent}", "make it, or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write in {path.parent}", "name another directory")
