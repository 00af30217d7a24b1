"""What a trained network's classifier sees of images, as numbers for other programs to work on.

`python -m tools.extract_features CHECKPOINT FILES_OR_FOLDER --output features.npz`. Features are
written as they are computed, so that memory does not grow with the number of images.
"""

import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cli.flag_types import Flag, text
from fileio import atomic
from tools import cli
from tools.inference import network, sources
from tools.inference.images import OVERWRITE, Unreadable, check_new, find_images

if TYPE_CHECKING:
    import numpy as np

FLAGS = {
    flag.name: flag
    for flag in (Flag("output", text, "features.npz", "file to write"), sources.CLASSES, OVERWRITE)
}
USAGE = f"""usage: python -m tools.extract_features CHECKPOINT FILES_OR_FOLDER... [options]
                                         [main.py's flags]

Writes the features of images, the input of the network's classifier, for numpy.load():
  features   (N, C) float32
  names      (N,) the images as they are named; of a folder, the paths below it
  labels     (N,) int64, and
  classes    (K,) names of the directories, for a folder with the images in a directory a class
{sources.SOURCES}
An image that cannot be read is an error line and left out, and the exit code is 3."""


def parse(argv: list[str]) -> cli.Command:
    """The command line; the first operand is the checkpoint.

    Raises:
        UsageError: a flag is wrong, or something is not named.
    """
    return network.parse(argv, FLAGS)


def features(
    net: network.LoadedModel, paths: list[str], bad: Unreadable
) -> Iterator[tuple["np.ndarray", list[int]]]:
    """Features (n, C) float32 batch by batch, and which of the paths they are of.

    Of ten crops it is the mean, from which the classifier computes the mean of their logits.
    """
    seen = []
    hook = net.model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for images, places in net.batches(paths, bad):
            net.logits(images)
            yield net.of_images(seen.pop().float()).cpu().numpy(), places
    finally:
        hook.remove()


def as_labels(names: list[str]) -> tuple[list[str], list[int]] | None:
    """Classes and the class number of each name, where all lie in directories; else None."""
    parts = [Path(name).parts for name in names]
    if not names or any(len(part) < 2 for part in parts):
        return None
    classes = sorted({part[0] for part in parts})
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[part[0]] for part in parts]


def write(
    target: IO[bytes], rows: IO[bytes], shape: tuple[int, int], others: dict[str, "np.ndarray"]
) -> None:
    """Write an .npz file of the features in `rows`, float32 one after the other, and of arrays."""
    import numpy as np

    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(target, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            shutil.copyfileobj(rows, entry)
        for name, values in others.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values)


def run(argv: list[str]) -> int:
    """Write the features that the command line asks for; the exit code."""
    asked = parse(argv)
    checkpoint, *arguments = asked.arguments
    output = Path(asked.options.output)
    check_new(output, asked.options.overwrite)
    sources.check_there(Path(checkpoint))
    paths = find_images(arguments)

    import numpy as np

    from datasets.file_loader import translate_worker_errors
    from experiment import console

    classes = asked.options.classes and Path(asked.options.classes)
    net, bad = network.load(Path(checkpoint), asked.main_flags, classes), Unreadable()
    folder = Path(arguments[0]) if len(arguments) == 1 and Path(arguments[0]).is_dir() else None
    names, width = [], net.model.classifier.in_features
    with (
        atomic.atomic_open(output) as target,
        tempfile.TemporaryFile(dir=output.parent) as rows,  # how many there are is known at the end
        translate_worker_errors(),  # a lost process is no error of the file
    ):
        for values, places in features(net, paths, bad):
            rows.write(values.astype("<f4").tobytes())
            names += [os.path.relpath(paths[i], folder) if folder else paths[i] for i in places]
        rows.seek(0)
        others = {"names": np.array(names, dtype=np.str_)}
        labelled = as_labels(names) if folder else None
        if labelled:
            others["classes"] = np.array(labelled[0], dtype=np.str_)
            others["labels"] = np.array(labelled[1], dtype=np.int64)
        write(target, rows, (len(names), width), others)
    console.info(f"{output}: {len(names)} images, {width} features each")
    return bad.code


def main(argv: list[str]) -> int:
    """Write the features of images."""
    return cli.run(argv, USAGE, FLAGS, run, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
