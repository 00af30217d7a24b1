"""Test that the files of Keras are read bit for bit, and nothing outside of them."""

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import checkpoints
from errors import CheckpointError
from fileio import hdf5
from helpers import foreign_files
from helpers.foreign_files import FORMATS, KERAS, keras3, keras_archive, legacy, path_of

HEAD = {"head/kernel"}


def loaded(directory: Path, content: bytes, suffix: str = ".h5") -> dict[str, torch.Tensor]:
    return checkpoints.load_weights(path_of(directory, suffix, content))


def check(found: dict[str, torch.Tensor], extra: set[str] = frozenset()) -> None:
    """Check that all of the network arrived, and nothing else."""
    assert found.keys() == KERAS.keys() | extra
    for name, values in KERAS.items():
        assert found[name].dtype == torch.float32
        assert np.array_equal(found[name].numpy(), values), name


def refusal(directory: Path, content: bytes, suffix: str = ".h5") -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(directory, content, suffix)
    line = caught.value.report()
    assert re.fullmatch(rf"error: [^\n]*network{re.escape(suffix)}[^\n]+; fix: [^\n]+", line)
    return line


@pytest.mark.parametrize(
    ("write", "arguments", "extra"),
    [
        (keras3, (), set()),
        (foreign_files.nested3, (), HEAD | {"head/bias"}),
        (legacy, (), set()),
        (legacy, (KERAS, True), set()),
        (foreign_files.legacy_model, (), set()),
        (foreign_files.legacy_nested, (), HEAD),
        (foreign_files.legacy_nested, ("densenet/",), HEAD),
    ],
)
def test_each_layout_of_keras_is_read_by_the_names_of_its_layers(tmp_path, write, arguments, extra):
    content = foreign_files.hdf5(write, *arguments)
    check(loaded(tmp_path, content), extra)
    check(loaded(tmp_path, keras_archive(content), ".keras"), extra)


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5"])
def test_what_is_written_has_the_layout_of_keras_and_reads_back(tmp_path, suffix):
    weights = {name: torch.from_numpy(values) for name, values in KERAS.items()}
    content = hdf5.to_bytes(weights, suffix)
    check(loaded(tmp_path, content, suffix))
    with h5py.File(io.BytesIO(content)) as file:
        if suffix == ".h5":
            assert [*file.attrs["layer_names"]] == list(foreign_files.GROUPS)
            names = [name for layer in file for name in file[layer].attrs["weight_names"]]
            assert {*names} == {*KERAS} and "keras_version" in file.attrs
        else:
            for layer, group in foreign_files.GROUPS.items():
                assert file[f"layers/{group}/vars"].attrs["name"] == layer
            assert "vars" in file


@pytest.mark.parametrize("kwargs", [{"compression": "gzip", "shuffle": True}, {"dtype": ">f8"}])
def test_packed_and_big_endian_numbers_are_read(tmp_path, kwargs):
    def write(file):
        keras3(file)
        place = file["layers/conv2d/vars"]
        del place["0"]
        place.create_dataset("0", data=KERAS["conv1_conv/kernel"], **kwargs)

    found = loaded(tmp_path, foreign_files.hdf5(write))["conv1_conv/kernel"]
    assert np.array_equal(found.numpy(), KERAS["conv1_conv/kernel"])


PLACE = "layers/conv2d/vars/0"
SECRET = np.ones((3, 3, 3, 4), np.float32)


def external_storage(file, other):
    place, name = PLACE.rsplit("/", 1)
    file[place].create_dataset(
        name, SECRET.shape, "f4", external=[(str(other), 0, h5py.h5f.UNLIMITED)]
    )


def virtual(file, other):
    layout = h5py.VirtualLayout(SECRET.shape, "f4")
    layout[:] = h5py.VirtualSource(str(other), "secret", SECRET.shape)
    file.create_virtual_dataset(PLACE, layout)


OUTSIDE = {
    "soft link": lambda file, other: file.__setitem__(PLACE, h5py.SoftLink("/layers/secret")),
    "external link": lambda file, other: file.__setitem__(
        PLACE, h5py.ExternalLink(other, "secret")),
    "link to weights": lambda file, other: file.__setitem__(
        "model_weights", h5py.ExternalLink(other, "/")),
    "external storage": external_storage,
    "virtual dataset": virtual,
    "reference": lambda file, other: file.__setitem__(
        PLACE, np.array([file["layers"].ref], dtype=h5py.ref_dtype)),
    "text": lambda file, other: file.__setitem__(PLACE, "text"),
    "a group in itself": lambda file, other: file.__setitem__("layers/again", file["layers"]),
    "numbers that are not there": lambda file, other: file.create_dataset(
        PLACE, (10**6, 10**6), "f4"),
    "chunks that are not there": lambda file, other: file.create_dataset(
        PLACE, (10**6, 10**6), "f4", chunks=(10, 10), compression="gzip"),
    "a name that is a reference": lambda file, other: file["layers/dense/vars"].attrs.__setitem__(
        "name", file.ref),
    "not finite": lambda file, other: file.__setitem__(PLACE, SECRET * np.nan),
    "complex": lambda file, other: file.__setitem__(PLACE, SECRET * 1j),
    "two layers of one name": lambda file, other: file["layers/conv2d_1/vars"].attrs.__setitem__(
        "name", "predictions"),
    "two networks": lambda file, other: keras3(file.create_group("layers/functional")),
}  # fmt: skip


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_is_not_in_the_file_or_no_weight_is_one_line(tmp_path, kind):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["secret"] = SECRET

    def write(file):
        keras3(file)
        if kind != "two networks":
            del file[PLACE]
        OUTSIDE[kind](file, other)

    refusal(tmp_path, foreign_files.hdf5(write))


@pytest.mark.parametrize(
    ("write", "pattern"),
    [
        (lambda file: keras3(file, named=False), r"Keras before 3\.6; fix: .*model\.save"),
        (lambda file: file.attrs.update(PYTABLES_FORMAT_VERSION="2.1"), "PyTables"),
        (lambda file: file.attrs.update(_NCProperties="version=2"), "netCDF"),
        (lambda file: file.create_dataset("x", data=[1.0]), "without weights of Keras"),
    ],
)
def test_other_hdf5_files_are_refused_by_their_program(tmp_path, write, pattern):
    assert re.search(pattern, refusal(tmp_path, foreign_files.hdf5(write)))


def test_a_file_of_keras_cannot_be_resumed_and_needs_h5py(tmp_path, monkeypatch):
    for suffix in (".h5", ".weights.h5", ".keras"):
        path = path_of(tmp_path, suffix, FORMATS[suffix](KERAS))
        with pytest.raises(CheckpointError, match="a file of Keras, for --retrain only"):
            checkpoints.load(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refusal(tmp_path, foreign_files.hdf5(keras3))
    assert line.endswith("h5py; fix: pip install -r requirements-tools.txt")


@pytest.mark.parametrize(
    ("read", "code", "said"),
    [
        ("all(iter(lambda: 1, 0))", -signal.SIGXCPU, b""),
        ("open('/dev/null')", 1, b"Too many open files"),
    ],
)
def test_the_process_that_reads_ends_in_time_and_opens_no_file(read, code, said):
    """Put code that never ends or opens a file in the place of what reads, in the process."""
    program = "import fileio.hdf5_worker as worker; worker.READ_S = 1; "
    program += f"worker.Reader.read = lambda self, file: {read}; worker.main()"
    data = FORMATS[".h5"](KERAS)
    found = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True)
    assert found.returncode == code and said in found.stderr


def test_a_file_that_takes_too_long_is_one_line(tmp_path, monkeypatch):
    killed = subprocess.CompletedProcess([], -signal.SIGXCPU, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    assert "takes too long to read; fix:" in refusal(tmp_path, FORMATS[".h5"](KERAS))


@pytest.mark.parametrize("suffix", FORMATS)
def test_numbers_that_are_not_finite_are_refused_in_every_format(tmp_path, suffix):
    """Change a number in the middle of a tensor to infinity, in each format's own way."""
    from tools.inference import sources

    for value in (0.0, np.inf):
        weights = {name: values.copy() for name, values in KERAS.items()}
        weights["predictions/kernel"][3, 2] = value
        path = path_of(tmp_path, suffix, FORMATS[suffix](weights))
        if value == 0:
            assert any(5 in tensor.shape for tensor in sources.read(path).weights.values())
        else:
            with pytest.raises(CheckpointError, match=r"not finite|damaged"):
                sources.read(path)
