"""Find the image files that a command line names, report unreadable ones, check output paths."""

import os
import sys
from pathlib import Path

from cli.flag_types import Flag, boolean
from errors import DataError, StorageError, UsageError

OVERWRITE = Flag("overwrite", boolean, False, "replace an output file that exists", const="true")


class Unreadable:
    """Report images that cannot be read, one line each, and let the others go on.

    Takes the place of datasets.file_loader.UnreadableImages.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, reason: str) -> None:
        """Report one image."""
        self.count += 1
        error = DataError(f"cannot read image {reason}", "replace or remove the file")
        print(error.report(), file=sys.stderr)

    def sync(self) -> None:
        """Do nothing at the end of a pass: there is only one process."""

    @property
    def code(self) -> int:
        """Return the exit code of a tool that went on without these images."""
        return DataError.code if self.count else 0


def find_images(arguments: list[str]) -> list[str]:
    """List the named files, and the images below the named directories, in order.

    Raises:
        DataError: an argument does not exist, or a directory holds no image.
    """
    for argument in arguments:
        if not os.path.exists(argument):
            raise DataError(f"no such file or directory: {argument}", "name images or directories")

    from datasets.image_folder import find_image_files  # loads torch

    paths = []
    for argument in arguments:
        found = find_image_files(Path(argument)) if os.path.isdir(argument) else [argument]
        if not found:
            raise DataError(f"no images in {argument}", "name images or directories of them")
        paths += found
    return paths


def check_new(path: Path, overwrite: bool) -> None:
    """Check that an output file can be written, without writing it.

    Raises:
        UsageError: it exists and must not be replaced.
        StorageError: its directory is missing or read-only.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no file", "name another")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists", "name another, or add --overwrite true")
    if not path.parent.is_dir():
        raise StorageError(f"no directory {path.parent}", "make it, or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write in {path.parent}", "name another directory")
