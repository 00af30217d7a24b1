"""What tools.export writes computes the same elsewhere, and comes back to the same result."""

import contextlib
import importlib.util
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision

import checkpoints
import models.factory
import opts
from errors import RunError
from faults.contract import TINY_FILES, command, write_files
from fileio import tensor_files
from helpers.inference import scramble
from helpers.run_main import run
from tools.export import __main__ as export
from tools.inference import onnx_io
from tools.inference.network import load

IMAGENET = TINY_FILES | {"nThreads": 0}
RESNET = {"dataset": "imagenet", "imageSize": 72, "netType": "resnet", "depth": 18}
SMALL = {"dataset": "cifar10", "depth": 10, "growthRate": 2}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory) -> Path:
    """A run of ImageNet's shape on a few images, which lie beside it in `data`."""
    root = tmp_path_factory.mktemp("export")
    data = write_files(root / "data")
    result = run(command(**IMAGENET, nEpochs=1, data=data, save=root / "run"))
    assert result.code == 0, result.err
    return root / "run"


@pytest.fixture(scope="module")
def onnx_file(trained_run, tmp_path_factory) -> tuple[Path, str]:
    """The run as an ONNX file, compared on its images, and what was printed about that."""
    images = trained_run.parent / "data" / "val"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        source = [str(trained_run), f"--images={images}"]
        path = exported(tmp_path_factory.mktemp("onnx"), "onnx", source)
    return path, printed.getvalue()


def evaluated(run_directory: Path, source: str) -> list[str]:
    """Return loss and errors of --testOnly as they are printed."""
    flags = command(**IMAGENET, data=run_directory.parent / "data", testOnly=True)
    result = run([*flags, source])
    assert result.code == 0, result.err
    found = re.findall(r"(?:Err|top1|top5):? +(\S+)", result.out)
    assert len(found) == 5
    return found


@pytest.fixture
def weights_of(tmp_path):
    """Writes plain weights of a network; the arguments and flags that name them."""

    def write(flags: dict, num_classes: int = 10) -> list[str]:
        model = scramble(models.factory.create(opts.parse(command(**flags)), num_classes))
        tensor_files.save_weights(tmp_path / "plain.pt", model.state_dict())
        return [str(tmp_path / "plain.pt"), *command(**flags)]

    return write


def exported(tmp_path: Path, to: str, source: list[str], code: int = 0) -> Path:
    output = tmp_path / f"exported.{'onnx' if to == 'onnx' else 'pt'}"
    line = [*source, f"--to={to}", f"--output={output}", "--overwrite"]
    assert export.main(line) == code
    return output


# ----------------------------------------------------------------------------- there and back again


@pytest.mark.parametrize("to", ["torchvision", "timm", "onnx"])
def test_evaluation_of_what_came_back_equals_the_original(trained_run, onnx_file, tmp_path, to):
    if to == "onnx":
        back = exported(tmp_path, "weights", [str(onnx_file[0])])
    else:
        back = exported(tmp_path, to, [str(trained_run)])
    wanted = evaluated(trained_run, f"--resume={trained_run}")
    assert evaluated(trained_run, f"--retrain={back}") == wanted
    before, state = checkpoints.load_weights(trained_run / "model_last.pt"), weights_in(back)
    counters = {name for name in before if name.endswith("num_batches_tracked")}
    assert all(torch.equal(before[name], state[name]) for name in before.keys() - counters)


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


BLOCKS = (1, 1, 1, 1)
PEERS = {
    ("densenet", "torchvision"): lambda: torchvision.models.densenet.DenseNet(
        4, BLOCKS, 8, num_classes=10
    ),
    ("densenet", "timm"): lambda: timm.models.densenet.DenseNet(4, BLOCKS, num_classes=10),
    ("resnet", "torchvision"): lambda: torchvision.models.resnet18(num_classes=10),
    ("resnet", "timm"): lambda: timm.create_model("resnet18", num_classes=10),
}


@pytest.mark.parametrize("name, to", PEERS)
def test_a_peer_loads_the_weights_strictly_and_computes_our_logits(
    weights_of, tmp_path, capsys, name, to
):
    flags = {"densenet": IMAGENET | {"growthRate": 4, "initChannels": 8}, "resnet": RESNET}[name]
    source = weights_of(flags | {"dataset": "imagenet"})
    path = exported(tmp_path, to, source)
    assert f"{to} computes the same logits" in capsys.readouterr().out
    network = PEERS[name, to]()
    network.load_state_dict(weights_in(path), strict=True)
    images = torch.randn(2, 3, 72, 72, dtype=torch.float64)
    with torch.no_grad():
        wanted = load(Path(source[0]), [*source[1:], "--precision=double"]).model(images)
        found = network.double().eval()(images)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9)


IMPOSSIBLE = {
    "small images": (SMALL, "no densenet for images of 32 pixels"),
    "pre-activation": (RESNET | {"netType": "preresnet"}, "no preresnet"),
    "no bottleneck": (IMAGENET | {"dataset": "imagenet", "bottleneck": False}, "no such densenet"),
    "no compression": (IMAGENET | {"dataset": "imagenet", "reduction": 1}, "no such densenet"),
}


@pytest.mark.parametrize("to", ["torchvision", "timm"])
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_network_they_do_not_have_is_refused_with_what_is_possible(
    weights_of, tmp_path, capsys, case, to
):
    flags, shown = IMPOSSIBLE[case]
    output = exported(tmp_path, to, weights_of(flags), code=2)
    line = capsys.readouterr().err
    assert re.fullmatch(f"error: {to} has {shown}.*; fix: use --to onnx or --to weights\n", line)
    assert not output.exists()


def test_a_network_that_computes_something_else_is_refused(weights_of, monkeypatch):
    source = weights_of(RESNET)
    net = load(Path(source[0]), source[1:])
    build = export.peer_network

    def with_other_eps(*args):
        model = build(*args)
        model.bn1.eps = 0.1
        return model

    monkeypatch.setattr(export, "peer_network", with_other_eps)
    with pytest.raises(RunError, match="computes other logits"):
        export.peer_weights(net, "torchvision")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_never_agree(wrong):
    images = [torch.ones(2, 3), torch.ones(1, 3)]
    assert export.compare(torch.neg, torch.neg, images) == (3, 0.0, 0.0)
    assert export.compare(torch.neg, torch.zeros_like, images) == (3, 1.0, 1.0)
    for factors in ([wrong, 1], [1, wrong]):  # in the first batch, in the second
        *_, share = export.compare(torch.clone, lambda x, rest=factors: x * rest.pop(), images)
        assert not share <= export.LIMIT
    with pytest.raises(RunError, match="not finite"):
        export.compare(lambda x: x * wrong, torch.clone, images)


# -------------------------------------------------------------------------------------------- ONNX


NETWORKS = {
    "basic": SMALL | {"bottleneck": False, "reduction": 1, "depth": 7},
    "preresnet": SMALL | {"netType": "preresnet", "depth": 11, "growthRate": None},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_computes_the_logits_and_the_weights_come_back_exactly(
    weights_of, tmp_path, name
):
    source = weights_of(NETWORKS[name])
    path = exported(tmp_path, "onnx", source)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    net = load(Path(source[0]), [*source[1:], "--nGPU=0"])
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        wanted = net.logits(images)
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()

    graph = onnx.load(path).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: value.numpy() for name, value in net.model.state_dict().items()
             if not name.endswith("num_batches_tracked")}  # fmt: skip
    assert state.keys() <= stored.keys()
    assert all(np.array_equal(stored[name], state[name]) for name in state)
    norms = sum(name.endswith("running_var") for name in state)
    assert [node.op_type for node in graph.node].count("BatchNormalization") == norms

    back = load(path, ["--nGPU=0"])
    assert back.opt.depth == net.opt.depth and back.classes == net.classes
    assert (back.mean, back.std) == (net.mean, net.std)
    assert torch.equal(back.logits(images), net.logits(images))


def test_an_onnx_file_is_compared_on_random_and_given_images(trained_run, onnx_file):
    path, printed = onnx_file
    assert "on 4 random images: logits at most" in printed and "on 4 images:" in printed
    assert load(path).classes == ["cat", "dog"]
    assert str(trained_run.parent).encode() not in path.read_bytes()


def test_a_file_that_computes_something_else_is_reported_and_not_written(
    trained_run, onnx_file, tmp_path, monkeypatch, capsys
):
    proto = onnx.load(onnx_file[0])
    bias = next(part for part in proto.graph.initializer if part.name == "classifier.bias")
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + np.float32(1e-2)).tobytes()
    monkeypatch.setattr(onnx_io, "as_onnx", lambda *args: proto.SerializeToString())
    output = exported(tmp_path, "onnx", [str(trained_run)], code=1)
    said = capsys.readouterr().err
    assert "beyond rounding" in said and "nothing was written" in said
    assert not output.exists()
    exported(tmp_path, "onnx", [str(trained_run), "--check=false"])
    assert "random" not in capsys.readouterr().out


def damaged(content: bytes, how: str) -> bytes:
    proto = onnx.load_model_from_string(content)
    if how == "cut":
        return content[: len(content) // 2]
    if how == "empty":
        return b""
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2)
    if how == "flipped":
        weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]
    elif how == "shape":
        weight.dims[0] = 2**40
    elif how == "not finite":
        weight.raw_data = np.full(weight.dims, np.nan, np.float32).tobytes()
    elif how == "elsewhere":
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="/etc/passwd")
    else:
        (prop,) = (prop for prop in proto.metadata_props if prop.key == how)
        prop.value = "{"
    return proto.SerializeToString()


DAMAGE = ["cut", "empty", "flipped", "shape", "not finite", "elsewhere", "settings", "data"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_onnx_file_is_one_line(onnx_file, tmp_path, how):
    path = Path(shutil.copy(onnx_file[0], tmp_path))
    load(path)
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(RunError) as error:
        load(path)
    assert re.fullmatch("error: [^\n]+; fix: [^\n]+", error.value.report())


def test_a_foreign_onnx_file_is_plain_weights(onnx_file, tmp_path):
    proto = onnx.load(onnx_file[0])
    del proto.metadata_props[:]
    path = tmp_path / "foreign.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(RunError, match="does not describe their network"):
        load(path)
    assert load(path, command(**IMAGENET)).classes == ["0", "1"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "timm"])
def test_a_missing_package_is_named_and_nothing_is_written(
    weights_of, tmp_path, monkeypatch, capsys, package
):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name)
    )
    to = "timm" if package == "timm" else "onnx"
    output = exported(tmp_path, to, weights_of(RESNET), code=1)
    assert f"tools.export needs {package}" in capsys.readouterr().err
    assert not output.exists()


def test_an_existing_file_is_not_replaced_unasked(trained_run, tmp_path, capsys):
    output = tmp_path / "weights.pt"
    output.write_text("precious")
    line = [str(trained_run), "--to=weights", f"--output={output}"]
    assert export.main(line) == 2
    assert output.read_text() == "precious" and "--overwrite true" in capsys.readouterr().err
    assert export.main([*line, "--overwrite=true"]) == 0
    mine, theirs = weights_in(output), weights_in(trained_run / "model_last.pt")
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    shutil.rmtree(tmp_path)
    assert export.main(line) == 6
