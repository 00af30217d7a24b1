"""Test that safetensors are read and written bit for bit, and damaged ones refused in one line."""

import json
import random
import re

import pytest
import safetensors
import safetensors.torch
import timm
import timm.models
import torch

import checkpoints
import models.state_dicts
from errors import CheckpointError
from fileio import safetensors as files
from fileio import tensor_files
from helpers.hostile_files import equal
from helpers.networks import network

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
LINE = "--dataset imagenet --d1 1 --d2 1 --d3 1 --d4 1 --growthRate 4 --initChannels 8"


def values() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    drawn = {str(dtype): torch.randn(3, 4).to(dtype) for dtype in DTYPES}
    return drawn | {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3)}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_of_any_precision_go_out_and_in_bit_for_bit(tmp_path, name):
    path, metadata = tmp_path / name, {"settings": "depth: 10\n", "data": "ä"}
    path.write_bytes(files.to_bytes(values(), metadata))
    for found in (checkpoints.load_weights(path), safetensors.torch.load_file(path)):
        assert equal(dict(sorted(found.items())), dict(sorted(values().items())))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata().items() >= (metadata | {"format": "pt"}).items()
    assert files.read_metadata(path).items() >= metadata.items()


@pytest.mark.parametrize("prefix", ["", "timm.", "timm_model."])
def test_weights_as_timm_publishes_them_are_read(tmp_path, prefix):
    model = timm.models.densenet.DenseNet(4, (1, 1, 1, 1), num_classes=10)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path, {"format": "pt"})
    ours = network(f"{LINE} --manualSeed 3", 10)
    models.state_dicts.load_weights(ours, checkpoints.load_weights(path))
    assert equal(dict(ours.state_dict()), dict(model.state_dict()))
    assert files.read_metadata(path) == {}  # it does not describe the network


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Cut, lengthen, or change the header of a file."""
    header = 8 + int.from_bytes(whole[:8], "little")
    way = draw.randrange(4)
    if way == 0:
        return whole[: draw.randrange(len(whole))]
    if way == 1:
        return whole + draw.randbytes(draw.randint(1, 100))
    place = draw.randrange(header if way == 2 else 8)
    return whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]


@pytest.mark.parametrize("by", ["this program", "timm"])
def test_two_hundred_damaged_files_are_refused_in_one_line_each(tmp_path, by):
    model, path = network(LINE, 10), tmp_path / "w.safetensors"
    state = model.state_dict()
    if by == "timm":
        whole = safetensors.torch.save(state, {"format": "pt"})
    else:
        whole = files.to_bytes(tensor_files.on_cpu(state), {"settings": "depth: 10", "data": "{}"})
    draw, outside = random.Random(0), 0
    for _ in range(200):
        path.write_bytes(damaged(whole, draw))
        try:
            models.state_dicts.load_weights(model, checkpoints.load_weights(path))
        except CheckpointError as error:
            assert re.fullmatch("error: [^\n]+; fix: [^\n]+", error.report())
        else:  # timm's metadata, or spaces at the end
            assert equal(dict(model.state_dict()), dict(state))
            outside += 1
    assert outside <= 4


def test_a_header_that_is_too_long_is_refused_before_it_is_parsed(tmp_path):
    header = json.dumps({"__metadata__": {"a": "x" * files.MAX_HEADER}}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"w is damaged \(its header has 4194331 bytes\)"):
        checkpoints.load_weights(tmp_path / "w")


def test_a_changed_number_is_found_only_by_our_digest_or_where_it_is_not_finite(tmp_path):
    path = tmp_path / "w.safetensors"
    for by_us in (True, False):
        weights = {"w": torch.ones(2, 2)}
        whole = files.to_bytes(weights, {}) if by_us else safetensors.torch.save(weights)
        for last, is_found in ((b"\x00\x00\x80\x3e", by_us), (b"\x00\x00\x80\x7f", True)):
            path.write_bytes(whole[:-4] + last)
            if is_found:
                with pytest.raises(CheckpointError, match=r"digest|not finite: w"):
                    checkpoints.load_weights(path)
            else:
                assert checkpoints.load_weights(path)["w"][1, 1] == 0.25


def test_safetensors_cannot_be_resumed(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(files.to_bytes({"w": torch.ones(2, 2)}, {}))
    with pytest.raises(CheckpointError, match="a safetensors file, for --retrain only"):
        checkpoints.load(tmp_path / "w.safetensors")


def test_a_file_of_the_package_with_null_as_its_metadata_is_read(tmp_path):
    header = b'{"__metadata__":null,"w":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert equal(checkpoints.load_weights(path), {"w": torch.zeros(1, 1)})
    assert files.read_metadata(path) == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_is_read_despite_the_suffix(tmp_path, zipped):
    path, weights = tmp_path / "w.safetensors", {"w": torch.ones(2, 2)}
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    assert equal(checkpoints.load_weights(path), weights)


def test_a_pointer_or_a_damaged_beginning_is_named_despite_the_suffix(tmp_path):
    path = tmp_path / "model.safetensors"
    for content, what in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<html>", "is a web page"),
        (bytes(100), "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=what):
            checkpoints.load_weights(path)
