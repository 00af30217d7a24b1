"""Test that networks in 8 bits decide as before, and that none is written which does not."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from errors import CheckpointError, RunError, UsageError
from faults.contract import command
from helpers.run_main import run
from helpers.sample_data import error_line
from tools.export import __main__ as export
from tools.export import quantise
from tools.inference import data
from tools.inference.network import load

DIGITS = {"dataset": "digits", "depth": 10, "growthRate": 4, "nEpochs": 4, "batchSize": 16}
GOES_WITH_NONE = "int8 goes with none of half, images and check false"
NAMES = {"onnx": "net.onnx", "openvino": "net.xml"}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> Path:
    """Train a DenseNet on scikit-learn's digits, which it mostly recognises after four epochs."""
    directory = tmp_path_factory.mktemp("digits") / "run"
    assert run([*command(**DIGITS), f"--save={directory}"]).code == 0
    return directory


@pytest.fixture(scope="module")
def in_8_bits(digits_run, tmp_path_factory) -> Path:
    """Export it as ONNX with a scale for each channel."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    with contextlib.redirect_stdout(io.StringIO()):
        assert written(digits_run, path, "--to=onnx", "--int8=channel") == 0
    return path


def written(source: Path, output: Path, *flags: str) -> int:
    return export.main([str(source), f"--output={output}", "--overwrite", *flags])


def decisions_of(path: Path, images: torch.Tensor) -> np.ndarray:
    if path.suffix == ".xml":
        openvino = pytest.importorskip("openvino")
        model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return model({"images": images.numpy()})["logits"].argmax(1)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.numpy()})[0].argmax(1)


@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_eight_bits_keep_decisions_and_a_wrong_calibration_writes_nothing(
    digits_run, tmp_path, capsys, monkeypatch, to, scales
):
    if to == "openvino":
        pytest.importorskip("nncf")
    path, flags = tmp_path / NAMES[to], (f"--to={to}", f"--int8={scales}")
    assert written(digits_run, path, *flags) == 0
    found = re.search(r"error of (\d+) images: (.*) % in single precision, (.*) % in 8 bits; (.*) "
                      "% are decided alike", capsys.readouterr().out)  # fmt: skip
    count, before, after, alike = map(float, found.groups())
    net = load(digits_run)
    test = [*data.open_data(net).val.batches(0)]
    images, labels = (torch.cat(parts).numpy() for parts in zip(*test, strict=True))
    ours = net.logits(torch.from_numpy(images)).argmax(1).numpy()
    theirs = decisions_of(path, torch.from_numpy(images))
    assert count == len(labels) and before == round(100 * (ours != labels).mean(), 2) < 40
    assert after == pytest.approx(100 * (theirs != labels).mean(), abs=0.3)
    assert alike == pytest.approx(100 * (theirs == ours).mean(), abs=0.3) and alike > 97
    calibration = data.calibration_batches
    monkeypatch.setattr(data, "calibration_batches", lambda net, count: (
        images * net.std[0] + net.mean[0] for images in calibration(net, count)))  # fmt: skip
    other = tmp_path / f"other{path.suffix}"
    assert written(digits_run, other, *flags) == RunError.code and not other.exists()
    assert re.search(r"8 bits decide \d+ of 360 images in another way", capsys.readouterr().err)


@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_weights_are_bytes_with_a_scale_for_each_output_channel_or_for_all(
    digits_run, in_8_bits, tmp_path, scales
):
    path = in_8_bits if scales == "channel" else tmp_path / "net.onnx"
    if scales == "tensor":
        assert written(digits_run, path, "--to=onnx", "--int8=tensor") == 0
    graph = onnx.load(path).graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 5
    for node in convolutions:
        stored, scale, zero = (values[name] for name in makers[node.input[1]].input)
        assert stored.dtype == np.uint8 and (zero == 128).all()
        assert scale.size == (len(stored) if scales == "channel" else 1)
        assert len({*scale.ravel().tolist()}) == scale.size
    assert max(each.size for each in values.values() if each.dtype == np.float32) < 200
    inputs = [node.input for node in graph.node if node.op_type == "Concat"]
    own = [{values[makers[name].input[1]].item() for name in names if name in makers
            and makers[name].op_type == "DequantizeLinear"} for names in inputs]  # fmt: skip
    assert max(map(len, own)) > 1  # no scale for all parts of a concatenation


@pytest.mark.parametrize("pixels", [False, True], ids=["normalised", "pixels"])
def test_it_is_calibrated_on_plain_training_images_as_the_file_takes_them(
    digits_run, tmp_path, monkeypatch, pixels
):
    seen, whole = [], quantise.Calibration.to_onnx
    monkeypatch.setattr(quantise.Calibration, "to_onnx", lambda self, content: (
        seen.extend(self.batches) or whole(self, content)))  # fmt: skip
    flags = ["--to=onnx", "--int8=tensor", f"--withPreprocessing={str(pixels).lower()}"]
    assert written(digits_run, tmp_path / "net.onnx", *flags) == 0
    net, images = load(digits_run), np.concatenate(seen)
    if not pixels:
        images = (images.transpose(0, 2, 3, 1) * net.std + net.mean).round().astype(np.uint8)
    splits = data.open_data(net, training=True)
    train, test = ({each.tobytes() for each in split.images.pixels.numpy()}
                   for split in (splits.train, splits.val))  # fmt: skip
    found = {each.tobytes() for each in images}
    assert len(images) == quantise.CALIBRATED and found <= train and not found <= test


@pytest.mark.parametrize("slip", [lambda x: x * np.nan, lambda x: x[:, :-1]], ids=["nan", "shape"])
def test_logits_that_are_not_finite_or_of_another_shape_are_refused(digits_run, slip):
    net = load(digits_run)
    images = [lambda x: x, net.model]
    quantise.check(net, *images, net.model)
    said = error_line(quantise.check, net, *images, lambda x: slip(net.model(x)), of=RunError)
    assert "logits in 8 bits are not finite" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--to=litert"], "no 8 bits with --to litert"),
        (["--to=onnx", "--half"], GOES_WITH_NONE),
        (["--to=onnx", "--images=."], GOES_WITH_NONE),
        (["--to=onnx", "--check=false"], GOES_WITH_NONE),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together_are_refused_in_one_line(flags, said):
    line = ["run", "--output=net", "--int8=channel", *flags]
    assert said in error_line(export.parse, line, of=UsageError)


def test_a_file_in_8_bits_is_no_checkpoint(in_8_bits):
    assert "is quantised" in error_line(load, in_8_bits, of=CheckpointError)
