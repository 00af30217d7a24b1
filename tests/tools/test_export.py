"""Test that files of tools.export compute the same elsewhere, and when they are read back."""

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import timm.models
import torch
import torchvision

import checkpoints
import models.factory
import opts
from errors import CheckpointError, RunError
from faults.contract import TINY_FILES, command
from fileio import tensor_files
from helpers.inference import scramble
from helpers.run_main import ROOT, run
from tools.export import __main__ as export
from tools.export import proof
from tools.inference import onnx_io
from tools.inference.network import load

IMAGENET = TINY_FILES | {"dataset": "imagenet"}
RESNET = {"dataset": "imagenet", "imageSize": 72, "netType": "resnet", "depth": 18}
SMALL = {"dataset": "cifar10", "depth": 10, "growthRate": 2}


@pytest.fixture(scope="module")
def onnx_file(large_run, tmp_path_factory) -> tuple[Path, str]:
    """Export the run as an ONNX file, compared on its images; return it and the output."""
    images = large_run.parent / "data" / "val"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        source = [str(large_run), f"--images={images}"]
        path = exported(tmp_path_factory.mktemp("onnx"), "onnx", source)
    return path, printed.getvalue()


@pytest.fixture
def weights_of(tmp_path):
    """Write plain weights of a network; return the arguments and flags that name them."""

    def write(flags: dict) -> list[str]:
        model = scramble(models.factory.create(opts.parse(command(**flags)), num_classes=10))
        tensor_files.save_weights(tmp_path / "plain.pt", model.state_dict())
        return [str(tmp_path / "plain.pt"), *command(**flags)]

    return write


def exported(tmp_path: Path, to: str, source: list[str], code: int = 0) -> Path:
    output = tmp_path / f"exported.{to if to in ('onnx', 'safetensors') else 'pt'}"
    line = [*source, f"--to={to}", f"--output={output}", "--overwrite"]
    assert export.main(line) == code
    assert output.exists() == (code == 0)
    return output


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def evaluated(run_directory: Path, source: str) -> list[str]:
    """Return loss and errors of --testOnly as they are printed."""
    data = run_directory.parent / "data"
    result = run([*command(**TINY_FILES, nThreads=0, data=data, testOnly=True), source])
    assert result.code == 0, result.err
    found = re.findall(r"(?:Err|top1|top5):? +(\S+)", result.out)
    assert len(found) == 5
    return found


@pytest.mark.parametrize("to", ["torchvision", "timm", "onnx", "safetensors"])
def test_the_evaluation_of_imported_weights_equals_the_originals(
    large_run, onnx_file, tmp_path, to
):
    if to == "onnx":
        back = exported(tmp_path, "weights", [str(onnx_file[0])])
    else:
        back = exported(tmp_path, to, [str(large_run)])
    wanted = evaluated(large_run, f"--resume={large_run}")
    assert evaluated(large_run, f"--retrain={back}") == wanted
    before, state = checkpoints.load_weights(large_run / "model_last.pt"), weights_in(back)
    counters = {name for name in before if name.endswith("num_batches_tracked")}
    assert all(torch.equal(before[name], state[name]) for name in before.keys() - counters)


DENSENET = IMAGENET | {"growthRate": 4, "initChannels": 8}
BLOCKS = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("to", "flags", "build"),
    [
        ("torchvision", DENSENET,
         lambda: torchvision.models.densenet.DenseNet(4, BLOCKS, 8, num_classes=10)),
        ("timm", DENSENET, lambda: timm.models.densenet.DenseNet(4, BLOCKS, num_classes=10)),
        ("torchvision", RESNET, lambda: torchvision.models.resnet18(num_classes=10)),
        ("timm", RESNET, lambda: timm.create_model("resnet18", num_classes=10)),
    ],
    ids=["torchvision-densenet", "timm-densenet", "torchvision-resnet", "timm-resnet"],
)  # fmt: skip
def test_a_peer_loads_the_weights_strictly_and_computes_our_logits(
    weights_of, tmp_path, capsys, to, flags, build
):
    source = weights_of(flags)
    path = exported(tmp_path, to, source)
    assert f"{to} in double precision, 4 images: logits at most" in capsys.readouterr().out
    network = build()
    network.load_state_dict(weights_in(path), strict=True)
    images = torch.randn(2, 3, 72, 72, dtype=torch.float64)
    with torch.no_grad():
        wanted = load(Path(source[0]), [*source[1:], "--precision=double"]).model(images)
        found = network.double().eval()(images)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("to", ["onnx", "safetensors", "weights"])
def test_channels_epsilon_and_input_range_go_with_the_weights(weights_of, tmp_path, to):
    flags = SMALL | {"nChannels": 1, "bnEps": 1.001e-5, "inputRange": "-1024,1024"}
    source = weights_of(flags)
    path = exported(tmp_path, to, source)
    described = [] if to != "weights" else source[1:]
    net, wanted = load(path, described), load(Path(source[0]), source[1:])
    assert (net.opt.nChannels, net.opt.bnEps, net.mean) == (1, 1.001e-5, [127.5])
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(net.logits(images), wanted.logits(images))
    if to == "onnx":
        nodes = [n for n in onnx.load(path).graph.node if n.op_type == "BatchNormalization"]
        found = {
            attribute.f for n in nodes for attribute in n.attribute if attribute.name == "epsilon"
        }
        assert nodes and found == {np.float32(1.001e-5)}


@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_a_run_of_any_precision_is_written_for_every_program(weights_of, tmp_path, precision):
    source = [*weights_of(DENSENET), f"--precision={precision}"]
    if precision == "double":  # weights that single precision does not hold
        path = Path(source[0])
        weights = weights_in(path).items()
        state = {name: item.double() * (1 + 1e-9) if item.is_floating_point() else item
                 for name, item in weights}  # fmt: skip
        tensor_files.save_weights(path, state)
    wanted = load(Path(source[0]), source[1:]).model.state_dict()
    for to in ("torchvision", "timm", "weights", "safetensors"):
        found = weights_in(exported(tmp_path, to, source))
        assert found.keys() == wanted.keys()
        assert all(found[name].dtype == wanted[name].dtype for name in wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    exported(tmp_path, "onnx", source)


def test_timm_and_torchvision_load_safetensors_by_name(weights_of, tmp_path):
    path = exported(tmp_path, "safetensors", weights_of(RESNET))
    wanted = weights_in(path)
    model = timm.create_model("resnet18", num_classes=10)
    timm.models.load_checkpoint(model, str(path))
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.load_state_dict(wanted, strict=True)
    for state in (model.state_dict(), theirs.state_dict()):
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_safetensors_are_a_checkpoint_to_the_tools(large_run, tmp_path):
    path = exported(tmp_path, "safetensors", [str(large_run)])
    net, back = load(large_run), load(path)
    assert (back.classes, back.mean, back.std) == (net.classes, net.mean, net.std)
    images = torch.randn(2, 3, 72, 72)
    assert torch.equal(back.logits(images), net.logits(images))
    onnx_path = exported(tmp_path, "onnx", [str(path)])
    assert load(onnx_path).classes == net.classes


@pytest.mark.parametrize(
    ("to", "flags", "shown"),
    [
        ("timm", SMALL, "no densenet for images of 32 pixels"),
        ("timm", RESNET | {"netType": "preresnet"}, "no preresnet"),
        ("torchvision", IMAGENET | {"bottleneck": False}, "no such densenet"),
        ("torchvision", IMAGENET | {"reduction": 1}, "no such densenet"),
    ],
)
def test_a_network_they_do_not_have_is_refused_with_what_is_possible(
    weights_of, tmp_path, capsys, to, flags, shown
):
    exported(tmp_path, to, weights_of(flags), code=2)
    line = capsys.readouterr().err
    assert re.fullmatch(f"error: {to} has {shown}.*; fix: use --to onnx or --to weights\n", line)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_never_agree(wrong):
    images = [torch.ones(2, 3), torch.ones(1, 3)]
    proof.compare("equal", torch.neg, torch.neg, images, 0.0)
    proof.compare("different", torch.neg, torch.zeros_like, images, 1.0)
    with pytest.raises(RunError, match=r"differ by 1\.0e\+00"):
        proof.compare("different", torch.neg, torch.zeros_like, images, 0.99)
    for factors in ([wrong, 1], [1, wrong]):  # in the first batch, in the second
        with pytest.raises(RunError, match="beyond rounding"):
            proof.compare("it", torch.clone, lambda x, rest=factors: x * rest.pop(), images, 1e9)
    with pytest.raises(CheckpointError, match="not finite"):
        proof.compare("it", lambda x: x * wrong, torch.clone, images, 1.0)


OTHERS = {
    "preresnet": {"depth": 11},
    "nin": {"widen": 0.1},
    "dsn": {"widen": 0.1},
    "fractalnet": {"widen": 0.1, "depth": 11},
}


@pytest.mark.parametrize("name", ["densenet", *OTHERS])
def test_onnx_runtime_computes_the_logits_and_the_weights_come_back_exactly(
    large_run, onnx_file, weights_of, tmp_path, name
):
    if name == "densenet":
        source, (path, printed) = [str(large_run)], onnx_file
        assert "on noise, 4 images: logits at most" in printed and "on files, 4 images:" in printed
        for private in (large_run.parent, ROOT):  # the exporter annotates nodes with source lines
            assert str(private).encode() not in path.read_bytes()
        assert not any(node.metadata_props for node in onnx.load(path).graph.node)
    else:
        source = weights_of({"dataset": "cifar10", "netType": name} | OTHERS[name])
        path = exported(tmp_path, "onnx", source)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    net = load(Path(source[0]), [*source[1:], "--nGPU=0"])
    for count in (1, 5):
        images = torch.randn(count, 3, net.opt.imageSize, net.opt.imageSize)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        wanted = net.logits(images)
        assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max()

    graph = onnx.load(path).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: value.numpy() for name, value in net.model.state_dict().items()
             if not re.match("companions|.*num_batches_tracked", name)}  # fmt: skip
    assert state.keys() <= stored.keys()
    assert all(np.array_equal(stored[name], state[name]) for name in state)
    norms = sum(name.endswith("running_var") for name in state)
    assert [node.op_type for node in graph.node].count("BatchNormalization") == norms

    back = load(path, ["--nGPU=0"])
    assert back.opt.depth == net.opt.depth and back.classes == net.classes
    assert (back.mean, back.std) == (net.mean, net.std)
    assert torch.equal(back.logits(images), net.logits(images))


def test_a_file_that_computes_other_logits_is_reported_and_not_written(
    large_run, onnx_file, tmp_path, monkeypatch, capsys
):
    proto = onnx.load(onnx_file[0])
    bias = next(part for part in proto.graph.initializer if part.name == "classifier.bias")
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + np.float32(1e-2)).tobytes()
    monkeypatch.setattr(onnx_io, "as_onnx", lambda *args: proto.SerializeToString())
    build = torchvision.models.densenet.DenseNet

    def with_other_eps(*args: object, **flags: object) -> torch.nn.Module:
        model = build(*args, **flags)
        model.features.norm0.eps = 0.1
        return model

    monkeypatch.setattr(torchvision.models.densenet, "DenseNet", with_other_eps)
    for to, code in (("onnx", 1), ("torchvision", 2)):
        exported(tmp_path, to, [str(large_run)], code=code)
        told = capsys.readouterr().err
        assert "beyond rounding" in told and "nothing was written" in told
    exported(tmp_path, "onnx", [str(large_run), "--check=false"])
    assert "noise" not in capsys.readouterr().out


def damaged(content: bytes, kind: str) -> bytes:
    proto = onnx.load_model_from_string(content)
    if kind == "cut":
        return content[: len(content) // 2]
    if kind == "empty":
        return b""
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2)
    if kind == "flipped":
        weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]
    elif kind == "shape":
        weight.dims[0] = 2**40
    elif kind == "not finite":
        weight.raw_data = np.full(weight.dims, np.nan, np.float32).tobytes()
    elif kind == "elsewhere":
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="/etc/passwd")
    else:
        (prop,) = (prop for prop in proto.metadata_props if prop.key == kind)
        prop.value = "{"
    return proto.SerializeToString()


DAMAGE = ("cut", "empty", "flipped", "shape", "not finite", "elsewhere", "settings", "data")


def test_the_advice_for_an_onnx_file_keeps_the_classes(onnx_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="an ONNX file") as caught:
        checkpoints.load_weights(onnx_file[0])
    _, _, command_line = caught.value.report().partition("python -m tools.export ")
    assert export.main(shlex.split(command_line)) == 0
    found = load(tmp_path / "weights.safetensors")
    assert found.classes == load(onnx_file[0]).classes


def test_a_damaged_onnx_file_is_one_line_and_a_foreign_one_plain_weights(onnx_file, tmp_path):
    path, whole = tmp_path / "copy.onnx", onnx_file[0].read_bytes()
    for kind in DAMAGE:
        path.write_bytes(damaged(whole, kind))
        with pytest.raises(CheckpointError) as error:
            load(path)
        assert re.fullmatch("error: [^\n]+; fix: [^\n]+", error.value.report()), kind

    proto = onnx.load_model_from_string(whole)
    del proto.metadata_props[:]
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(RunError, match="does not describe their network"):
        load(path)
    assert load(path, command(**TINY_FILES)).classes == ["0", "1"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "timm"])
def test_a_missing_package_is_named_and_nothing_is_written(
    large_run, weights_of, tmp_path, monkeypatch, capsys, package
):
    monkeypatch.setitem(sys.modules, "timm.models.resnet", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name)
    )
    # Of a DenseNet the rules of timm are restated, of a ResNet they are not.
    source = weights_of(RESNET) if package == "timm" else [str(large_run)]
    exported(tmp_path, "timm" if package == "timm" else "onnx", source, code=1)
    assert f"tools.export needs {package}" in capsys.readouterr().err
