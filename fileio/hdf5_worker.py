"""Read a file of Keras in a process of its own: libhdf5 never returns from some damaged ones.

Run by fileio/hdf5.py. The file comes on standard input, its weights leave on standard output in the
safetensors format; what is wrong with it, and the fix, on standard error. No file can be opened
once the bytes are read: links and external data lead nowhere, and no filter is loaded.
"""

import codecs
import json
import resource
import sys

import h5py
import numpy as np
import safetensors.numpy

from errors import CheckpointError
from fileio import limits

RESAVE = "load it in Keras, and save it again: model.save('FILE.h5')"
NORM, OTHER = ["gamma", "beta", "moving_mean", "moving_variance"], ["kernel", "bias"]
# An attribute of a file's root, and the program that writes it.
PROGRAMS = {"PYTABLES_FORMAT_VERSION": "PyTables", "_NCProperties": "netCDF"}
MEMORY, READ_S, READ_RATE = 2**27, 3, 2**25  # bytes, seconds, bytes a second


class Reader:
    """Read the weights of one file of `size` bytes by LAYER/VARIABLE."""

    def __init__(self, size: int):
        self.left = 2 * size  # bytes that numbers may still take
        self.groups: set[int] = set()  # addresses
        self.weights: dict[str, np.ndarray] = {}

    def read(self, file: h5py.File) -> dict[str, np.ndarray]:
        """Return the weights in the layout of Keras 3, or in that of Keras 2."""
        for attribute in PROGRAMS.keys() & file.attrs.keys():
            what = f"an HDF5 file of {PROGRAMS[attribute]}, not of Keras"
            raise CheckpointError(what, "name a file of weights")
        root = _child(file, "model_weights") if "model_weights" in [*file] else file
        for layer in _texts(root, "layer_names"):
            group = _child(root, layer)
            for name in _texts(group, "weight_names"):
                # Of conv1/bn: conv1/bn/gamma:0; of a layer in model m: conv1/bn/gamma or with m/.
                path, _, variable = name.removesuffix(":0").rpartition("/")
                own = f"/{path}".endswith(f"/{layer}") or not path
                inner = layer if own else path.removeprefix(f"{layer}/")
                self._add(inner, variable, _child(group, name))
        if root is file and not self.weights:
            self._walk(file, "")
        if not self.weights:
            fix = "save them in Keras: model.save_weights('FILE.weights.h5')"
            raise CheckpointError("an HDF5 file without weights of Keras", fix)
        return self.weights

    def _walk(self, group: h5py.Group, path: str) -> None:
        """Read the `vars` of each layer in a group, at any depth."""
        address = h5py.h5o.get_info(group.id).addr
        if address in self.groups:
            raise CheckpointError("a group is in two places", RESAVE)
        self.groups.add(address)
        items = {name: _child(group, name) for name in group if f"{path}/{name}" != "/optimizer"}
        arrays = {n: item for n, item in items.items() if isinstance(item, h5py.Dataset)}
        if path.endswith("/vars") and arrays:
            names = _texts(group, "name")
            if not names:
                raise CheckpointError("no names of layers, as of Keras before 3.6", RESAVE)
            # By shapes: in a class of the user's, its attribute is the name of the group.
            is_norm = [item.ndim for item in arrays.values()] == [1] * 4
            kinds = NORM if is_norm else OTHER if arrays["0"].ndim > 1 else []
            for number, item in arrays.items():
                self._add(names[0], dict(enumerate(kinds)).get(int(number), number), item)
        for name, item in items.items():
            if isinstance(item, h5py.Group):
                self._walk(item, f"{path}/{name}")

    def _add(self, layer: str, variable: str, item: object) -> None:
        """Add the numbers of a dataset that lie in the file, in this machine's byte order."""
        name = f"{layer.replace('/', '_')}/{variable}"
        if name in self.weights:
            fix = "save the network alone: model.get_layer(NAME).save_weights('FILE.weights.h5')"
            raise CheckpointError(f"holds several networks with {name}", fix)
        if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
            raise CheckpointError(f"{name} is not in the file", RESAVE)
        if item.dtype.kind not in "fiub" or item.dtype.itemsize > 8:
            raise CheckpointError(f"{name} holds {item.dtype}, no numbers", RESAVE)
        self.left -= item.nbytes
        is_whole = item.chunks or item.id.get_storage_size() >= item.nbytes
        if self.left < 0 or not is_whole:
            raise CheckpointError(f"{name} claims more than the file holds", "use another file")
        self.weights[name] = np.ascontiguousarray(item[()], item.dtype.newbyteorder("="))


def _child(group: h5py.Group, path: str) -> object:
    """Return what lies under a path, without following a link."""
    for name in path.split("/"):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise CheckpointError(f"holds no {group.name}/{name}, or a link there", RESAVE)
        group = group[name]
    return group


def _texts(group: h5py.Group, name: str) -> list[str]:
    """Return the texts of an attribute, which Keras splits into name0, name1, ... if it is long."""
    names = [name] if name in group.attrs else []
    while f"{name}{len(names)}" in group.attrs:
        names.append(f"{name}{len(names)}")
    texts = [text for part in names for text in np.ravel(group.attrs[part])]
    return [text if isinstance(text, str) else text.decode() for text in texts]


def main() -> None:
    """Read standard input within limits; die of a damaged file."""
    data = sys.stdin.buffer.read()
    codecs.lookup("ascii")  # imported when first needed, which is too late below
    seconds = READ_S + len(data) // READ_RATE
    try:
        with limits.memory_limit(MEMORY + 6 * len(data)):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            with h5py.File.in_memory(data) as file:
                written = safetensors.numpy.save(Reader(len(data)).read(file))
    except CheckpointError as error:
        sys.exit(json.dumps(error.problems[0]))
    sys.stdout.buffer.write(written)


if __name__ == "__main__":
    main()
