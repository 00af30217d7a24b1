"""Test that weights are found in what other programs save, and that nothing in it is executed."""

import argparse
import collections
import contextlib
import datetime
import enum
import io
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import timm.utils
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.densenet import DenseNet

import checkpoints
from errors import CheckpointError
from faults import bombs
from fileio import inert_pickle, tensor_files
from helpers.foreign_files import pdparams as pdparams_file
from helpers.hostile_files import Call, equal, pickles

WEIGHTS = {"features.conv0.weight": torch.ones(2, 3, 3, 3), "classifier.weight": torch.eye(2)}
OTHERS = {name: tensor + 1 for name, tensor in WEIGHTS.items()}


def prefixed(prefix: str, weights=WEIGHTS) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def net() -> DenseNet:
    return DenseNet(4, (1, 1, 1, 1), 8, num_classes=5)


def loaded(state: object, tmp_path: Path, key: str | None = None, **options) -> tuple[dict, list]:
    """Save a value with torch, and read weights from it; return them and the notes."""
    torch.save(state, tmp_path / "w.pth", **options)
    notes = []
    return checkpoints.load_weights(tmp_path / "w.pth", key, notes.append), notes


def refusal(state: object, tmp_path: Path, key: str | None = None) -> str:
    """Return the line that reading a value ends in."""
    with pytest.raises(CheckpointError) as caught:
        loaded(state, tmp_path, key)
    line = caught.value.report()
    assert re.fullmatch(r"error: [^\n]*w\.pth[^\n]+; fix: [^\n]+", line)
    return line


# Prefixes and dictionaries:
@pytest.mark.parametrize(
    "state",
    [
        prefixed("module."),
        prefixed("model."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod.model."),
        prefixed("timm_model."),
        {"state_dict": prefixed("module.densenet121.")},
        prefixed("encoder."),
        {name.replace("features.", "features._orig_mod."): w for name, w in WEIGHTS.items()},
        {"state_dict": prefixed("model.") | {"criterion.weight": torch.eye(3)}},
        *({name: WEIGHTS} for name in ["model_state_dict", "net", "network", "weights", "params"]),
        {"checkpoint": {"model": prefixed("module.")}, "epoch": 3},
        {"model": WEIGHTS, "momentum": OTHERS, "confusion": torch.eye(5)},
        WEIGHTS | {"epoch": 3},
    ],
    ids=lambda state: "-".join(state)[:60],
)  # fmt: skip
def test_weights_are_found_under_every_prefix_and_in_every_dictionary(tmp_path, state):
    weights, _ = loaded(state, tmp_path)
    assert weights.keys() == WEIGHTS.keys() and all(
        torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS
    )


def test_names_beside_the_network_are_noted(tmp_path):
    state = prefixed("model.") | {"criterion.weight": torch.eye(3), "loss.a": torch.zeros(1)}
    _, (note,) = loaded(state, tmp_path)
    assert note.endswith(
        "w.pth: reads the weights under model., without criterion.weight and 1 more"
    )


@pytest.mark.parametrize(
    ("state", "average", "plain"),
    [
        ({"state_dict": WEIGHTS, "state_dict_ema": OTHERS}, "state_dict_ema", "state_dict"),
        ({"model": WEIGHTS, "model_ema": prefixed("module.", OTHERS)}, "model_ema", "model"),
        ({"net": WEIGHTS, "ema": {"state_dict": OTHERS, "decay": 0.9}}, "ema", "net"),
        (prefixed("model.") | prefixed("ema_model.module.", OTHERS), "ema_model", "model"),
    ],
)  # fmt: skip
def test_the_moving_average_is_read_with_a_note_and_a_key_names_the_other(
    tmp_path, state, average, plain
):
    weights, (note,) = loaded(state, tmp_path)
    assert equal(weights, OTHERS)
    assert re.search(rf"reads {average}\S*, the moving average; .* FILE:{plain}$", note)
    for key, wanted in ((plain, WEIGHTS), (average, OTHERS)):
        assert equal(loaded(state, tmp_path, key)[0], wanted)


def test_a_moving_average_of_the_parameters_alone_is_not_preferred(tmp_path):
    model = net()
    average = {"decay": 0.9, "shadow": dict(model.named_parameters())}
    state = {"model": model.state_dict(), "ema": average}
    weights, (note,) = loaded(state, tmp_path)
    assert equal(weights, dict(model.state_dict()))
    statistics = [name for name in weights if "running_" in name]
    assert note.endswith(f": reads model; ema.shadow lacks {len(statistics)} of its tensors")
    line = refusal(state, tmp_path, "ema")
    assert f"parameters alone in ema.shadow: no {min(statistics)}; fix: name FILE:model" in line


def test_a_moving_average_without_counters_is_preferred(tmp_path):
    state = net().state_dict()
    average = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    assert equal(loaded({"model": state, "ema": average}, tmp_path)[0], average)


def test_a_dictionary_under_two_names_is_one_network_that_both_name(tmp_path):
    state = {"model": WEIGHTS, "model_ema": WEIGHTS}
    for key in (None, "model", "model_ema"):
        assert equal(loaded(state, tmp_path, key), (WEIGHTS, []))


def test_two_networks_of_one_name_are_refused(tmp_path):
    state = {"a.b": WEIGHTS, "a": {"b": OTHERS}}
    assert "holds two networks under a.b; fix: save one of them alone" in refusal(state, tmp_path)


def test_several_networks_are_refused_until_one_is_named(tmp_path):
    state = {"student": prefixed("backbone."), "teacher": prefixed("backbone.", OTHERS)}
    line = refusal(state, tmp_path)
    assert "several networks; fix: name FILE:student.backbone or FILE:teacher.backbone" in line
    assert equal(loaded(state, tmp_path, "teacher")[0], OTHERS)
    assert "holds no pupil; fix: name FILE:student" in refusal(state, tmp_path, "pupil")
    assert "holds no pupil; fix: leave out the key" in refusal(WEIGHTS, tmp_path, "pupil")


# Checkpoints of other programs:
def test_a_checkpoint_of_timms_training_script_is_read(tmp_path):
    model = net()
    average = timm.utils.ModelEmaV3(model)
    with torch.no_grad():
        model.classifier.weight += 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    saver = timm.utils.CheckpointSaver(
        model, optimizer, argparse.Namespace(model="densenet121", lr=0.1, crop=None),
        average, timm.utils.NativeScaler("cpu"), checkpoint_dir=str(tmp_path),
    )  # fmt: skip
    saver.save_checkpoint(3, metric=np.float64(71.5))
    path, notes = tmp_path / "last.pth.tar", []
    found = checkpoints.load_weights(path, None, notes.append)
    assert equal(found, dict(average.module.state_dict()))
    assert "reads state_dict_ema, the moving average" in notes[0] and len(notes) == 1
    found = checkpoints.load_weights(path, "state_dict")
    assert equal(found, dict(model.state_dict()))


def test_a_checkpoint_of_torchvisions_reference_script_is_read(tmp_path):
    model = net()
    average = AveragedModel(model)
    average.n_averaged += 3
    state = {"model": model.state_dict(), "model_ema": average.state_dict(), "epoch": 3}
    weights, notes = loaded(state | {"args": argparse.Namespace(amp=True)}, tmp_path)
    assert equal(weights, dict(average.module.state_dict()))
    assert len(notes) == 1  # none about n_averaged
    assert equal(loaded(average.state_dict(), tmp_path), (weights, []))


class Mode(enum.Enum):
    TRAIN = 1


class Attributes(dict):
    """Stand for EasyDict, CfgNode and their like."""


class Items(list):
    pass


@dataclass
class Config:
    rate: float
    path: Path


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


HARMLESS = {
    "namespace": argparse.Namespace(lr=0.1, nested=SimpleNamespace(a=[1])),
    "path": Path("data"),
    "default dict": collections.defaultdict(list, a=[1]),
    "named tuple": collections.namedtuple("Args", "lr")._make([1]).__class__.__bases__,
    "deque": collections.deque([1, 2], maxlen=3),
    "date": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "numpy": [np.float64(1), np.arange(3), np.dtype("float32"), np.array(["a"])],
    "enum": Mode.TRAIN,
    "dictionary": Attributes(a=1, b=Attributes(c=2)),
    "list": Items([1, 2]),
    "dataclass": Config(0.1, Path("x")),
    "slice, range, set": [slice(1), range(3), {1, 2}, frozenset((1,)), 1 + 2j, b"x"],
    "function": [os.getcwd, len, net],
    "module": Net(),
    "large numbers": [2**80, -(2**31) - 1, 1e300, "x" * 300, None, True],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", HARMLESS.values(), ids=HARMLESS)
def test_weights_beside_objects_of_any_class_are_read(tmp_path, value, protocol, zipped):
    # Views of one storage, numbers of every kind, an empty tensor, and a Parameter.
    base = torch.arange(24.0).reshape(4, 6)
    weights = {
        "features.conv0.weight": base[1:3, ::2],
        "transposed": base.T,
        "parameter": nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        **{str(t): torch.ones(2, dtype=t) for t in (torch.half, torch.bfloat16, torch.double)},
        **{str(t): torch.ones(2, dtype=t) for t in (torch.bool, torch.uint8, torch.int32)},
    }
    state = {"before": value, "state_dict": collections.OrderedDict(weights), "after": [value]}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    found, _ = loaded(state, tmp_path, **options)
    assert found.keys() == weights.keys()
    for name in weights:
        assert found[name].dtype == weights[name].dtype
        assert torch.equal(found[name], weights[name])


_grid = np.arange(24.0).reshape(2, 3, 4)
ARRAYS = {
    "plain": _grid, "fortran": np.asfortranarray(_grid), "strided": _grid[:, ::2],
    "turned": _grid.T, "empty": np.zeros((0, 3)), "scalar": np.array(3.5),
    **{code: np.ones(3, code) for code in (">f4", ">i2", "f2", "i8", "u1", "i1", "?")},
}  # fmt: skip


def check_arrays(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        values = found[name].numpy()
        assert values.dtype == array.dtype.newbyteorder("=") and found[name].is_contiguous()
        assert np.array_equal(values, array)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_arrays_are_read_as_weights_in_any_layout(tmp_path, protocol):
    for zipped in (True, False):
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        for state in (ARRAYS, {"args": argparse.Namespace(), "state_dict": ARRAYS}):
            check_arrays(loaded(state, tmp_path, **options)[0])
    # A file of Paddle, which may keep the name of a parameter beside it, in a state of its own.
    path = tmp_path / "w.pdparams"
    tuples = {name: Call(tuple, (f"{name}_0", array)) for name, array in ARRAYS.items()}
    for state in (ARRAYS, tuples, {"model": tuples, "epoch": 3}):
        path.write_bytes(pdparams_file(state, protocol))
        check_arrays(checkpoints.load_weights(path))


def test_arrays_as_python_2_pickled_them_are_read(tmp_path):
    """Write the text of its protocol 2: bytes are the opcode U."""
    numbers = np.arange(6, dtype="<f4").tobytes()
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
             b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
             b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
             b"\x89U\x18" + numbers + b"tb")  # fmt: skip
    path = tmp_path / "w.pdparams"
    path.write_bytes(b"\x80\x02}U\x01w" + array + b"s.")
    (weights,) = checkpoints.load_weights(path).values()
    assert weights.tolist() == [[0, 1, 2], [3, 4, 5]]
    # The same numbers do not fill a larger array, nor one of two unknown sizes.
    for shape in (b"K\x09K\x03\x86", b"J\xff\xff\xff\xffJ\xfa\xff\xff\xff\x86"):
        path.write_bytes(b"\x80\x02}U\x01w" + array.replace(b"K\x02K\x03\x86", shape) + b"s.")
        with pytest.raises(CheckpointError, match=r"w\.pdparams is not a checkpoint"):
            checkpoints.load_weights(path)


def test_what_is_written_for_paddle_is_a_pickle_of_arrays(tmp_path):
    path = tmp_path / "w.pdparams"
    tensor_files.save_weights(path, WEIGHTS)
    found = pickle.loads(path.read_bytes())
    assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in WEIGHTS.items())
    assert equal(checkpoints.load_weights(path), WEIGHTS)


def test_parameters_that_paddle_has_split_are_refused_with_what_joins_them(tmp_path):
    path = tmp_path / "w.pdparams"
    parts = {"w": {"slices": ["w@@.0"], "OriginShape": (3,)}}
    path.write_bytes(pdparams_file({"w@@.0": np.ones(3), "UnpackBigParamInfor@@": parts}, 2))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_weights(path)
    assert "holds parameters in parts; fix: in Paddle: paddle.save(" in caught.value.report()


def test_a_pickled_network_is_refused_by_its_class(tmp_path):
    for state in (net(), {"args": argparse.Namespace(), "model": net()}):
        line = refusal(state, tmp_path)
        assert (
            "holds no state dict, but a pickled torchvision.models.densenet.DenseNet; fix" in line
        )
        assert line.endswith("torch.save(model.state_dict(), FILE)")


@pytest.mark.parametrize("kind", pickles(Path("marker")))
def test_a_call_beside_weights_is_not_made(tmp_path, kind):
    marker = tmp_path / "executed"
    hostile = pickles(marker)[kind]
    torch.save({"state_dict": WEIGHTS, "args": 0}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    plain = next(content for name, content in entries.items() if name.endswith("data.pkl"))
    protocol = re.match(rb"(\x80.)?", hostile)[0]
    call = hostile.removeprefix(protocol).removesuffix(b".") + b"0"  # the result is dropped
    frame = 9 if call[:1] == b"\x95" else 0  # its length, in protocol 4
    changed = (protocol or b"\x80\x02") + call[frame:] + plain[2:]
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, changed if content is plain else content)
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "w.pth", weights_only=False)
    assert marker.exists()  # whoever runs it is harmed
    marker.rename(tmp_path / "harm")
    assert equal(checkpoints.load_weights(tmp_path / "w.pth"), WEIGHTS)
    assert not marker.exists()


def test_a_call_among_weights_is_not_made_and_its_tensor_is_missing(tmp_path):
    marker = tmp_path / "executed"
    call = Call(eval, f"open({str(marker)!r}, 'w').close()")
    weights, _ = loaded({"state_dict": WEIGHTS | {"bias": call}}, tmp_path)
    assert equal(weights, WEIGHTS) and not marker.exists()


# Damage:
TUPLE = b"NN\x86"  # a key of tuples that repeat one tuple would take exponential time to hash
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + TUPLE + b"NK\x00NtQ"


@pytest.mark.parametrize(
    ("pickled", "value"),
    [
        (b"(" + TUPLE + b"K\x01d", {}),
        (b"}" + TUPLE + b"K\x01s", {}),
        (b"}(" + TUPLE + b"K\x01u", {}),
        (b"\x8f(" + TUPLE + b"K\x01u", set()),
        (b"ccollections\nOrderedDict\n(]" + TUPLE + b"K\x01\x86atR", {}),
        (b"(" + TUPLE + b"\x91", ((None, None),)),
        (STORAGE, None),
        (TUPLE + TUPLE + b"\x93", None),
    ],
)
def test_a_tuple_is_no_key_of_a_dictionary_of_another_program(pickled, value):
    file = bombs.old_format(b"\x80\x04" + pickled + b"." + pickle.dumps([]))
    with pytest.raises(ValueError, match="no text") if value is None else contextlib.nullcontext():
        assert inert_pickle.load(file) == value


def test_a_file_without_checksums_is_read_as_weights_only(tmp_path):
    path = tmp_path / "w.pth"
    torch.serialization.set_crc32_options(False)
    try:
        found, _ = loaded({"state_dict": WEIGHTS, "args": argparse.Namespace()}, tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(found, WEIGHTS)
    with pytest.raises(CheckpointError, match="has no checksum"):
        checkpoints.load(path)


def test_numbers_that_are_not_finite_are_named_and_only_those_that_are_used_count(tmp_path):
    nan = torch.full((2, 2), torch.nan)
    line = refusal(WEIGHTS | {"classifier.weight": nan}, tmp_path)
    assert "a weight that is not finite: classifier.weight" in line
    state = {"state_dict": WEIGHTS, "best_loss": torch.tensor(torch.inf), "optimizer": {"a": nan}}
    assert equal(loaded(state, tmp_path)[0], WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_numbers_that_are_no_weights_are_refused_by_name(tmp_path, dtype):
    kind = str(dtype).removeprefix("torch.")
    state = WEIGHTS | {"classifier.weight": torch.ones(2, 2).to(dtype)}
    assert f"classifier.weight is {kind}" in refusal(state, tmp_path)


def numpy_file(save, *values: object) -> bytes:
    file = io.BytesIO()
    save(file, *values)
    return file.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


KINDS = {
    "weights.h5": (b"\x89HDF\r\n\x1a\n" + bytes(50), r"damaged \(not readable as HDF5\)"),
    "w.mat": (b"MATLAB 7.3 MAT-file, Platform: GLNXA64", "a file of MATLAB"),
    "model.onnx": (b"\x08\x08\x12\x07pytorch\x1a", "an ONNX file"),
    "model": (b"\x08\x08\x12\x07pytorch\x1a", "an ONNX file"),
    "saved_model.pb": (b"\x08\x01\x12\xf0", "a SavedModel of TensorFlow"),
    "m.data-00000-of-00001": (bytes(64), "a part of a TensorFlow checkpoint"),
    "flax.msgpack": (b"\x81\xa6params\x82", "a MessagePack file"),
    "w.npz": (numpy_file(np.savez, np.eye(2)), r"a NumPy archive \(.npz\)"),
    "w.npy": (numpy_file(np.save, np.eye(2)), "a NumPy array"),
    "w.pth.gz": (b"\x1f\x8b\x08" + bytes(30), "compressed"),
    "model.pt2": (zipped("archive/archive_format", b"pt2"), "a torch.export archive"),
    "w.zip": (zipped("model.safetensors", bytes(9)), "a zip archive without a state dict"),
    "model.pkl": (pickle.dumps(["a"]), "not a checkpoint"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_program_is_named_as_what_it_is(tmp_path, name):
    content, what = KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is {what}") as caught:
        checkpoints.load_weights(tmp_path / name)
    assert re.fullmatch("error: [^\n]+; fix: [^\n]+", caught.value.report())


def test_no_cut_file_of_another_program_is_read(tmp_path):
    for zipped in (True, False):
        state = {"args": argparse.Namespace(), "state_dict": WEIGHTS}
        loaded(state, tmp_path, _use_new_zipfile_serialization=zipped)
        path = tmp_path / "w.pth"
        whole = path.read_bytes()
        for size in range(0, len(whole), 11):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError):
                checkpoints.load_weights(path)
