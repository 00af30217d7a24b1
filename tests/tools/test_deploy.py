"""Test that a file for a program that runs networks is run there before it is kept.

TorchScript stands in for a program that may not be installed; those that are run as well.
"""

import importlib.util
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import models.factory
import opts
from faults.contract import TINY_FILES, command
from fileio import tensor_files
from helpers.inference import scramble
from tools.export import __main__ as export
from tools.export import deploy
from tools.export.runtimes import RUNTIMES, Runtime
from tools.inference.network import load

SMALL = {"dataset": "cifar10", "depth": 10, "growthRate": 4}
NETWORKS = {
    "densenet": TINY_FILES | {"dataset": "imagenet", "nClasses": None},
    "resnet": {"dataset": "cifar10", "netType": "resnet", "depth": 8},
}
GREY = {"nChannels": 1, "inputRange": "-1024,1024"}


@pytest.fixture
def source(tmp_path):
    """Write weights of a small network; return the arguments that name them."""

    def write(flags: dict = SMALL) -> list[str]:
        torch.manual_seed(1)
        line = command(**{name: each for name, each in flags.items() if each is not None})
        model = scramble(models.factory.create(opts.parse(line), num_classes=10))
        tensor_files.save_weights(tmp_path / "plain.pt", model.state_dict())
        return [str(tmp_path / "plain.pt"), *line]

    return write


def write_traced(job, path: Path) -> None:
    torch.jit.trace(job.module.in_half(job.half), job.example).save(path)
    path.with_suffix(".bin").write_bytes(b"second")


def open_traced(path: Path):
    module = torch.jit.load(path)
    return lambda images: module(images).detach().numpy()


PROGRAM = Runtime("It", (".xml", ".bin"), (), write_traced, open_traced)


@pytest.fixture
def stand_in(monkeypatch):
    """Put a program into the table, with changes."""

    def install(**changes) -> None:
        monkeypatch.setitem(RUNTIMES, "openvino", replace(PROGRAM, **changes))

    install()
    return install


def run(to: str, output: Path, source: list[str], *flags: str) -> int:
    return export.main([*source, f"--to={to}", f"--output={output}", *flags])


def changing(change):
    """Return an `open` whose results are changed, given the images."""

    def open(path: Path):
        logits = open_traced(path)
        return lambda images: change(logits, images)

    return open


def of_logits(change):
    return changing(lambda logits, images: change(logits(images)))


def failing(*args):
    os.write(1, b"much\nnoise\n")  # as C++ does
    raise ValueError("no such operation\nand a trace")


def cut(job, path: Path) -> None:
    write_traced(job, path)
    path.write_bytes(path.read_bytes()[:-2000])


WRONG = {
    "cannot write this network": {"write": failing},
    "cannot open its file": {"write": cut},
    "cannot run its file": {"open": changing(failing)},
    "shape \\(1, 11\\) instead": {"open": of_logits(lambda x: np.pad(x, [(0, 0), (0, 1)]))},
    "shape \\(1, 1\\) instead": {"open": of_logits(lambda x: x[:, :1])},
    "differ by nan": {"open": of_logits(lambda x: x * np.float32(np.nan))},
    "differ by 2.0e-04": {"open": of_logits(lambda x: x * np.float32(1 + 2e-4))},
}


@pytest.mark.parametrize("said", WRONG)
def test_files_that_are_damaged_or_compute_something_else_are_not_kept(
    source, stand_in, tmp_path, capfd, said
):
    weights = source()
    for name in ("net.xml", "net.bin"):
        (tmp_path / name).write_text("old")
    stand_in(**WRONG[said])
    assert run("openvino", tmp_path / "net.xml", weights, "--overwrite") == 1
    out, err = capfd.readouterr()
    assert re.search(said, err) and re.fullmatch("error: [^\n]+; fix: nothing [^\n]+\n", err)
    assert "trace" not in err and "noise\n" not in out
    assert {path.name for path in tmp_path.iterdir()} == {"plain.pt", "net.xml", "net.bin"}
    assert (tmp_path / "net.xml").read_text() == (tmp_path / "net.bin").read_text() == "old"


def test_both_files_are_written_and_neither_replaces_another(source, stand_in, tmp_path, capsys):
    weights, output = source(), tmp_path / "net.xml"
    assert run("openvino", output, weights) == 0
    told = capsys.readouterr().out
    assert "It on noise, 4 images: logits" in told and "images: float32 (1, 3, 32, 32)" in told
    assert f"{output} and {tmp_path / 'net.bin'}: " in told
    assert output.stat().st_size > 1000 and (tmp_path / "net.bin").read_bytes() == b"second"
    output.unlink()
    Path(weights[0]).unlink()  # is told before weights are read
    assert run("openvino", output, weights) == 2
    assert "net.bin exists; fix: name another, or add --overwrite" in capsys.readouterr().err


def test_what_is_not_checked_is_marked(source, stand_in, tmp_path, capsys):
    weights = source()
    assert run("openvino", tmp_path / "net.xml", weights, "--check=false") == 0
    stand_in(open=lambda path: None)
    assert run("openvino", tmp_path / "net.xml", weights, "--overwrite") == 0
    out, err = capsys.readouterr()
    assert err.count("note: not checked: It has not run it\n") == 2 and "noise" not in out


def test_half_precision_says_what_it_costs_and_garbage_is_refused(
    source, stand_in, tmp_path, capsys
):
    weights = source()
    assert run("openvino", tmp_path / "net.xml", weights, "--half") == 0
    told = capsys.readouterr().out
    off = re.search(r"half precision on noise, 4 images: .* off, (\S+) of the largest", told)
    assert 1e-5 < float(off[1]) < deploy.LIMIT_HALF / 4
    assert re.search(r"MB \(in single precision \S+ MB of weights\); images: float32", told)
    noise = np.random.default_rng(0)
    stand_in(open=of_logits(lambda x: x + 0.02 * np.abs(x).max() * noise.choice([-1, 1], x.shape)))
    assert run("openvino", tmp_path / "other.xml", weights, "--half") == 1


@pytest.mark.parametrize("changes", [{}, GREY], ids=["colour", "grey"])
def test_an_onnx_file_with_preprocessing_takes_bytes_and_its_weights_come_back(
    source, tmp_path, capsys, changes
):
    weights, output = source(SMALL | changes), tmp_path / "net.onnx"
    assert run("onnx", output, weights, "--withPreprocessing") == 0
    net, channels = load(Path(weights[0]), weights[1:]), changes.get("nChannels", 3)
    assert f"images: uint8 (N, 32, 32, {channels}) from 0 to 255" in capsys.readouterr().out
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, channels), dtype=np.uint8)
    images = (pixels.astype(np.float64) - net.mean) / net.std
    if changes:
        assert images.min() == -1024 and images.max() == 1024
    with torch.no_grad():
        given = torch.from_numpy(images.transpose(0, 3, 1, 2)).float()
        wanted = net.model(given).numpy()
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": pixels})
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    back = load(output)
    assert (back.classes, back.mean, back.std) == (net.classes, net.mean, net.std)
    assert torch.equal(back.logits(given), net.logits(given))


SLIPS = {
    "channels": lambda logits, images: logits(images.flip(3)),
    "rows and columns": lambda logits, images: logits(images.transpose(1, 2)),
    "scale": lambda logits, images: logits((images * (254 / 255)).byte()),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_wrong_preprocessing_is_noticed(source, stand_in, tmp_path, capsys, slip):
    weights, flags = source(), ["--withPreprocessing"]
    assert run("openvino", tmp_path / "net.xml", weights, *flags) == 0
    stand_in(open=changing(lambda logits, x: SLIPS[slip](logits, x).copy()))
    assert run("openvino", tmp_path / "other.xml", weights, *flags) == 1
    assert "beyond rounding" in capsys.readouterr().err


def test_files_are_compared_as_bytes(large_run, tmp_path, capsys):
    images = f"--images={large_run.parent / 'data' / 'val'}"
    flags = [images, "--withPreprocessing"]
    assert run("onnx", tmp_path / "net.onnx", [str(large_run)], *flags) == 0
    assert "on files, 4 images: logits at most" in capsys.readouterr().out


def test_a_half_onnx_file_is_read_back_as_what_it_holds(source, tmp_path):
    weights, output = source(), tmp_path / "net.onnx"
    assert run("onnx", output, weights, "--half", "--withPreprocessing") == 0
    state = load(output).model.state_dict()
    for name, value in load(Path(weights[0]), weights[1:]).model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(state[name], value.half().float())
    kinds = {each.name: each.data_type for each in onnx.load(output).graph.initializer}
    assert kinds["features.conv0.weight"] == onnx.TensorProto.FLOAT16
    assert kinds["pixel_mean"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("to", "flags", "said"),
    [
        ("torchvision", ["--half"], "half has no effect with --to torchvision"),
        ("timm", ["--withPreprocessing"], "withPreprocessing has no effect with --to timm"),
        ("weights", ["--check=false"], "check has no effect with --to weights"),
        ("ncnn", [], "ncnn reads .ncnn.param, not net.onnx; fix: --output net.ncnn.param"),
        ("onnx", ["--preprocess=gcn", "--withPreprocessing"], "preprocess gcn cannot be put into"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_command_without_sense_is_refused(source, monkeypatch, tmp_path, capsys, to, flags, said):
    weights = source()
    monkeypatch.setitem(RUNTIMES, "ncnn", replace(RUNTIMES["ncnn"], packages=()))
    monkeypatch.chdir(tmp_path)
    assert run(to, Path("net.onnx"), weights, *flags) == 2
    assert said in capsys.readouterr().err and not Path("net.onnx").exists()


@pytest.mark.parametrize("to", ["openvino", "litert", "ncnn", "executorch", "coreml"])
def test_a_missing_converter_is_named_with_its_version(monkeypatch, tmp_path, capsys, to):
    find = importlib.util.find_spec
    wanted = [each for each in RUNTIMES[to].packages if "==" in each]
    absent = wanted[0].partition("==")[0].replace("-", "_")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name)
    )
    output = tmp_path / f"net{RUNTIMES[to].suffixes[0]}"
    assert run(to, output, ["weights.pt"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: tools\.export needs \S+ for .*; fix: pip install {wanted[0]}.*\n",
                        said)  # fmt: skip
    assert sys.modules.get(absent) is None


def swapping(runtime):
    """Return an `open` that is given the channels of a picture in another order."""

    def open(path: Path):
        logits = runtime.open(path)
        return lambda images: logits(images.flip(3))

    return open


REAL = ("openvino", "ncnn", "coreml", "litert", "executorch")
MODULES = {"litert": "litert_torch", "coreml": "coremltools", "ncnn": "pnnx"}


@pytest.mark.parametrize("flag", ["--withPreprocessing", "--half"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("to", REAL)
def test_each_program_that_is_installed_computes_the_logits(
    source, tmp_path, capsys, monkeypatch, to, name, flag
):
    pytest.importorskip(MODULES.get(to, to))
    runtime, weights = RUNTIMES[to], source(NETWORKS[name])
    assert run(to, tmp_path / f"net{runtime.suffixes[0]}", weights, flag) == 0
    out, err = capsys.readouterr()
    assert all(path.exists() for path in runtime.files(tmp_path / f"net{runtime.suffixes[0]}"))
    if to == "coreml":
        assert "not checked: Core ML" in err
        return
    off = re.search(r"on noise, 4 images: .* off, (\S+) of the largest", out)
    assert float(off[1]) < (2e-3 if flag == "--half" else 3e-6)
    if flag != "--half":
        monkeypatch.setitem(RUNTIMES, to, replace(runtime, open=swapping(runtime)))
        assert run(to, tmp_path / f"other{runtime.suffixes[0]}", weights, flag) == 1
