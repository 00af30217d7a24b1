"""Whether a dataset is the one that a run began with: digests of what is in it."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from datasets.memory_loader import ImageTensors


def hash_images(images: ImageTensors) -> str:
    """SHA-256 of all pixels and labels."""
    digest = hashlib.sha256(str(tuple(images.pixels.shape)).encode())
    for values in (images.pixels, images.labels):
        digest.update(values.contiguous().numpy())
    return digest.hexdigest()


def hash_files(samples: Sequence[tuple[str, int]], root: Path) -> str:
    """SHA-256 of the names below `root`, the classes and the sizes of files, which are not read."""
    digest, start = hashlib.sha256(), len(str(root))
    for path, label in samples:
        try:
            size = os.stat(path).st_size
        except OSError:  # whoever reads it will say so
            size = None
        digest.update(repr((os.fsencode(path[start:]), label, size)).encode())
    return digest.hexdigest()
