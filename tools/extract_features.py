"""Write the features of images, the input of a trained network's classifier, for numpy.load().

usage: python -m tools.extract_features CHECKPOINT FILES_OR_FOLDER... [options] [main.py's flags]

  features   (N, C) float32
  names      (N,) the images as they are named; of a folder, the paths below it
  labels     (N,) int64, and
  classes    (K,) names of the directories, for a folder with the images in a directory a class

Features are written as they are computed, so that memory does not grow with the number of images.
An unreadable image is left out and reported in one error line, and the exit code is 3.
"""

import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.flag_types import Flag, pathname
from fileio import atomic
from tools import cli
from tools.inference import network, sources

if TYPE_CHECKING:
    import numpy as np

FLAGS = (
    Flag("output", pathname, "features.npz", "file to write"),
    sources.CLASSES,
    network.OVERWRITE,
)
TOOL = cli.Tool(
    (__doc__ or "") + sources.SOURCES, FLAGS, "image after the checkpoint", least=2, main_flags=True
)
parse = TOOL.parse


def features(
    net: network.LoadedModel, paths: list[str]
) -> Iterator[tuple["np.ndarray", list[int]]]:
    """Yield features (n, C) float32 batch by batch, with the indices of their paths.

    The features of ten crops are averaged, and those of all pixels where a network classifies
    pixels. The classifier maps them to the mean of the logits, but for scores that pass a ReLU.
    """
    inputs = []
    hook = net.model.classifier.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with hook:  # is removed at the end
        for images, indices in net.batches(paths):
            net.logits(images)
            found = inputs.pop().float()
            found = found.flatten(1, -2).mean(1) if found.dim() > 2 else found  # over pixels
            yield net.mean_over_crops(found).cpu().numpy(), indices


def labels_of(names: list[str]) -> dict[str, "np.ndarray"]:
    """Return classes, and the class number of each name, if all lie in directories; else {}."""
    import numpy as np

    directories = [Path(name).parts[0] for name in names if len(Path(name).parts) > 1]
    if not names or len(directories) < len(names):
        return {}
    classes, labels = np.unique(directories, return_inverse=True)
    return {"classes": classes, "labels": labels.astype(np.int64)}


def run(argv: list[str]) -> int:
    """Write the features of the images that the command line names; return the exit code."""
    command = parse(argv)
    arguments, output = command.arguments[1:], Path(command.options.output)
    net, paths = network.load_model_and_images(command, output, arguments)

    import numpy as np

    from datasets.file_loader import translate_worker_errors
    from experiment import console

    folder = arguments[0] if len(arguments) == 1 and os.path.isdir(arguments[0]) else None
    names, width = [], net.model.classifier.in_features
    with (
        atomic.atomic_open(output) as target,
        # The header needs the number of rows, which is known at the end.
        tempfile.TemporaryFile(dir=output.parent) as rows,
        translate_worker_errors(),  # inside: a lost worker is not an output error
    ):
        for values, indices in features(net, paths):
            rows.write(values.astype("<f4").tobytes())
            names += [os.path.relpath(paths[i], folder) if folder else paths[i] for i in indices]
        rows.seek(0)
        arrays = {"names": np.array(names, dtype=np.str_)} | (labels_of(names) if folder else {})

        # Write what np.savez would, without the features in memory.
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), width)}
        with zipfile.ZipFile(target, "w") as archive:
            with archive.open("features.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                shutil.copyfileobj(rows, entry)
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, values)
    console.info(f"{output}: {len(names)} images, {width} features each")
    return net.exit_code


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
