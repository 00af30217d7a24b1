"""Read and write the weights in Keras's files: `.weights.h5`, the legacy `.h5`, and `.keras`.

Names are LAYER/VARIABLE, such as `conv1_bn/gamma`, and layouts are Keras's, (h, w, in, out). HDF5
as Keras writes it has no checksum; a `.keras` file is a zip archive, whose CRCs are verified.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import safetensors.torch
from torch import Tensor

from errors import CheckpointError
from fileio.archive import entries, is_zip, verify_archive

ENTRY = "model.weights.h5"  # of a .keras file


def is_hdf5(data: bytes) -> bool:
    """Tell whether bytes begin as HDF5 does, or are a zip archive with such a file of Keras."""
    return data.startswith(b"\x89HDF\r\n\x1a\n") or (
        is_zip(data) and ENTRY.encode() in data[-(2**16) :]
    )


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """Read weights by LAYER/VARIABLE, bit for bit, in a process of its own with limits.

    Raises:
        CheckpointError: h5py is missing, or the file holds something else than weights.
        TimeoutError, ValueError: damaged.
    """
    _require_h5py()
    if is_zip(data):
        verify_archive(data)
        data = bytes(entries(data)[ENTRY])
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-m", "fileio.hdf5_worker"]
    worker = subprocess.run(command, input=data, capture_output=True, env=environment)
    if worker.returncode == 0:
        return safetensors.torch.load(worker.stdout)
    if worker.returncode == -signal.SIGXCPU:
        raise TimeoutError("takes too long to read")
    try:
        problem = json.loads(worker.stderr)
    except ValueError:
        raise ValueError("not readable as HDF5") from None
    raise CheckpointError(*problem)


def to_bytes(weights: dict[str, Tensor], suffix: str) -> bytes:
    """Write weights by LAYER/VARIABLE.

    Args:
        weights: layers in their running order, the variables of each in Keras's order.
        suffix: `.weights.h5` for the layout of Keras 3, `.h5` for that of Keras 2.

    Raises:
        CheckpointError: h5py is missing.
    """
    _require_h5py()
    import h5py

    layers: dict[str, list[str]] = {}
    for name in weights:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    counts: dict[str, int] = {}
    with h5py.File.in_memory() as file:
        if suffix == ".h5":
            file.attrs["keras_version"] = b"3.0.0"  # without it, Keras takes the file for one of 1
            file.attrs["layer_names"] = list(layers)
        else:
            file.create_group("vars")  # of the model itself, which Keras before 3.6 looks for
        for layer, names in layers.items():
            if suffix == ".h5":
                group, places = file.create_group(layer), names
                group.attrs["weight_names"] = names
            else:
                kinds = {1: "batch_normalization", 2: "dense", 4: "conv2d"}
                kind = kinds[weights[names[0]].dim()]
                number = counts[kind] = counts.get(kind, -1) + 1
                group = file.create_group(f"layers/{kind}{f'_{number}' if number else ''}/vars")
                group.attrs["name"], places = layer, list(map(str, range(len(names))))
            for place, name in zip(places, names, strict=True):
                group[place] = weights[name].detach().cpu().numpy()
        file.flush()
        return file.id.get_file_image()


def _require_h5py() -> None:
    if importlib.util.find_spec("h5py") is None:
        fix = "pip install -r requirements-tools.txt"
        raise CheckpointError("HDF5 files need the package h5py", fix)
