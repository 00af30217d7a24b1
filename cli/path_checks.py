"""Check that the files and directories of the settings exist, before anything heavy is loaded."""

import os
from pathlib import Path
from types import SimpleNamespace

from datasets.folder_checks import SPLITS, find_class_directories, layout_fix
from datasets.registry import DATASETS
from errors import CheckpointError, DataError, StorageError


def check_working_directory() -> None:
    """Raise StorageError if the current directory was removed: MKL cannot be loaded in one."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        what = "the current directory is gone"
        raise StorageError(what, "change to one that is there") from error


def check(opt: SimpleNamespace, is_first: bool = True) -> None:
    """Raise DataError or CheckpointError if a path that the run needs is missing.

    Args:
        is_first: whether this process reads weights and checkpoints, for itself and the others.
    """
    if is_first and opt.resume not in ("none", "auto") and not os.path.exists(opt.resume):
        what = f"resume: no such file or directory: {opt.resume}"
        raise CheckpointError(what, "name a run directory, or use --resume none")
    # A resumed run no longer needs the weights that it started from.
    is_fresh = is_first and opt.resume == "none"
    if is_fresh and opt.retrain != "none" and not os.path.isfile(split_key(opt.retrain)[0]):
        raise CheckpointError(f"retrain: no such file: {opt.retrain}", "name a file of weights")
    if DATASETS[opt.dataset].is_image_folder:
        _check_image_folder(Path(opt.data), ("val",) if opt.testOnly else SPLITS)


def split_key(name: str) -> tuple[Path, str | None]:
    """Split FILE:KEY, which names one of several networks in a file; the key is None in FILE."""
    file = name
    while not os.path.exists(file) and (end := file.rfind(":")) > 0:
        file = file[:end]
    is_key = file != name and os.path.isfile(file)
    return (Path(file), name[len(file) + 1 :]) if is_key else (Path(name), None)


def _check_image_folder(root: Path, splits: tuple[str, ...]) -> None:
    for directory in (root, *(root / split for split in splits)):
        if not os.path.isdir(directory):
            here = "" if root.is_absolute() else f" in {os.getcwd()}"
            raise DataError(f"no directory {directory}{here}", layout_fix(root, splits))
    for split in splits:
        find_class_directories(root / split)
