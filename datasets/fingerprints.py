"""Hash a dataset, so that a resumed run can check that it has not changed."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from datasets.memory_loader import ImageTensors


def hash_images(images: ImageTensors) -> str:
    """Hash all pixels and labels with SHA-256."""
    digest = hashlib.sha256(str(tuple(images.pixels.shape)).encode())
    for values in (images.pixels, images.labels):
        digest.update(values.contiguous().numpy())
    return digest.hexdigest()


def hash_files(samples: Sequence[tuple[str, int]], root: Path) -> str:
    """Hash paths below `root`, classes and file sizes with SHA-256; read no file."""
    digest, start = hashlib.sha256(), len(str(root))
    for path, label in samples:
        try:
            size = os.stat(path).st_size
        except OSError:  # the loader will report it
            size = None
        digest.update(repr((os.fsencode(path[start:]), label, size)).encode())
    return digest.hexdigest()
