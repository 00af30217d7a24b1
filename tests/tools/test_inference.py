"""Test that a network is the same from every source of its weights; others are refused clearly."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet

import checkpoints
import models.factory
import models.state_dicts
import opts
from errors import RunError
from faults.contract import command, refused
from fileio import tensor_files
from helpers.inference import logits
from helpers.run_main import ROOT, run
from helpers.sample_data import write_folder
from tools import classify, extract_features
from tools.export import __main__ as export
from tools.inference import network

NETWORK = {"dataset": "folder", "imageSize": 8, "depth": 10, "growthRate": 2}
FLAGS = command(**NETWORK)
LARGE = {"dataset": "imagenet", "imageSize": 72, "growthRate": 4, "initChannels": 6}
LARGE |= dict.fromkeys(("d1", "d2", "d3", "d4"), 1)


@pytest.fixture
def copied(small_run, tmp_path) -> Path:
    """Copy the run, so that a test may change it."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def by_hand(run_directory: Path, paths: list[str]) -> torch.Tensor:
    """Compute the logits of images without tools.inference."""
    model = models.factory.create(opts.parse(FLAGS), num_classes=2)
    weights = checkpoints.load_weights(run_directory / "model_last.pt")
    models.state_dicts.load_weights(model, weights)
    data = json.loads((run_directory / "data.json").read_text())
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    images = torch.from_numpy((pixels - data["mean"]) / data["std"]).float()
    with torch.no_grad():
        return model.eval()(images.permute(0, 3, 1, 2))


def test_a_network_is_the_same_from_every_source_of_its_weights(small_run, tmp_path):
    last, before = checkpoints.list_checkpoints(small_run)
    paths = network.find_images([str(small_run.parent / "data" / "val")])
    wanted = by_hand(small_run, paths)
    alone = shutil.copy(small_run / "model_last.pt", tmp_path / "alone.pt")
    for path, *described in (
        [small_run],
        [shutil.copy(last, tmp_path)],
        [shutil.copy(last, tmp_path / "renamed.pt")],
        [small_run / "model_last.pt"],
        [alone, FLAGS, small_run / "data.json"],
    ):
        net = network.load(Path(path), *described)
        assert net.classes == ["ant", "bee"] and not net.model.training
        assert torch.allclose(logits(net, paths), wanted, rtol=0, atol=1e-6)
    # The network of the epoch before computes other logits.
    assert not torch.allclose(logits(network.load(before), paths), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["checkpoint_7.pt", "ema.pth.tar", "plain.safetensors"])
def test_the_tools_read_weights_as_other_programs_save_them(small_run, tmp_path, capsys, name):
    weights, data = checkpoints.load_weights(small_run / "model_last.pt"), small_run / "data.json"
    path, paths = tmp_path / name, network.find_images([str(small_run.parent / "data" / "val")])
    if name == "checkpoint_7.pt":
        torch.save({"module." + key: value for key, value in weights.items()}, path)
    elif name == "ema.pth.tar":
        other = {key: value + 1 for key, value in weights.items()}
        args = argparse.Namespace(lr=1)
        torch.save({"state_dict": weights, "state_dict_ema": other, "args": args}, path)
        named = network.load(tmp_path / f"{name}:state_dict_ema", FLAGS, data)
        assert torch.equal(named.model.classifier.bias, other["classifier.bias"])
        path = tmp_path / f"{name}:state_dict"
    else:
        safetensors.torch.save_file(weights, path)
    net = network.load(path, FLAGS, data)
    assert torch.allclose(logits(net, paths), by_hand(small_run, paths), rtol=0, atol=1e-6)
    assert not capsys.readouterr().err  # what is named needs no note


def test_weights_without_a_classifier_are_refused_by_the_tools(small_run, tmp_path):
    weights = checkpoints.load_weights(small_run / "model_last.pt")
    del weights["classifier.weight"], weights["classifier.bias"]
    torch.save(weights, tmp_path / "body.pt")
    line = refusal(tmp_path / "body.pt", FLAGS, small_run / "data.json")
    assert line.endswith("; fix: use the weights of a whole network, with its classifier")


def refusal(*args: object) -> str:
    """Return the line of the error that loading ends in."""
    with pytest.raises(RunError) as error:
        network.load(*args)
    line = error.value.report()
    assert line.startswith("error: ") and "; fix: " in line and "\n" not in line
    return line


def test_the_newest_valid_checkpoint_is_taken_and_nothing_is_touched(copied, capsys):
    last, before = checkpoints.list_checkpoints(copied)
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(damaged)
    net = network.load(copied)
    assert "trying the one before" in capsys.readouterr().err
    assert last.read_bytes() == damaged
    wanted = network.load(before).model.state_dict()
    assert all(torch.equal(net.model.state_dict()[name], wanted[name]) for name in wanted)
    assert "is damaged" in refusal(last)
    before.unlink()
    # Without a valid checkpoint the error names the file of weights.
    line = refusal(copied)
    assert "no valid checkpoint among 1" in line and str(copied / "model_last.pt") in line


def test_given_flags_win_over_those_of_the_run_and_its_machine_is_forgotten(copied):
    assert network.load(copied).opt.batchSize == 8
    assert network.load(copied, ["--batchSize=3"]).opt.batchSize == 3
    assert "do not fit the network" in refusal(copied, ["--growthRate=3"])
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("retrain: none", "retrain: gone.pt\nnGPU: 64"))
    assert network.load(copied / "model_last.pt").opt.nGPU is None


def test_an_error_asks_for_what_plain_weights_lack(small_run, tmp_path):
    alone = Path(shutil.copy(small_run / "model_last.pt", tmp_path))
    data, names = small_run / "data.json", tmp_path / "names.txt"
    for flags, classes, shown in (
        ([], None, "does not describe their network"),
        (FLAGS, None, "mean and deviation"),
        (["--depth=16", *FLAGS[3:]], data, "do not fit the network"),
        ([*FLAGS, "--nClasses=3"], data, "nClasses is 3"),
        (FLAGS, b"one\ntwo\nthree\n", "3 classes, the weights have 2"),
        (FLAGS, b"one\n\n", "line without a name"),
        (FLAGS, b"\xff\xfe\x00", "not text"),
        (FLAGS, small_run / "nowhere", "cannot read"),
    ):
        if isinstance(classes, bytes):
            names.write_bytes(classes)
            classes = names
        assert shown in refusal(alone, flags, classes)


def test_other_names_of_known_classes_are_noted_and_another_order_is_refused(
    copied, tmp_path, capsys
):
    names = tmp_path / "names.txt"
    onnx = tmp_path / "net.onnx"
    assert export.main([str(copied), "--to=onnx", f"--output={onnx}", "--check=false"]) == 0
    checkpoint = checkpoints.list_checkpoints(copied)[0]
    for path in (copied, checkpoint, copied / "model_best.pt", onnx):
        for given in ("bee", "ant"), ("bee", "wasp"), ("class", "ant", "bee"):
            names.write_text("\n".join(given))
            line = refusal(path, (), names)
            assert f"another order: class 0 is {given[0]}, that of {path} is ant; " in line
        names.write_text("ant\nBiene\n")
        capsys.readouterr()
        net = network.load(path, (), names)
        assert net.classes == ["ant", "Biene"] and net.mean == network.load(path).mean
        note = f"note: {names} renames classes: class 1 is Biene, that of {path} is bee\n"
        assert capsys.readouterr().err == note


def test_missing_or_unusable_files_are_one_line(copied, tmp_path):
    assert "no such file or directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "text.pt").write_text("hello")
    assert "is text, not a checkpoint" in refusal(tmp_path / "text.pt")
    tensor_files.save_weights(tmp_path / "vectors.pt", {"a": torch.zeros(3)})
    assert "no classifier" in refusal(tmp_path / "vectors.pt", FLAGS)
    for content in (
        "[]",
        '{"classes": ["a", "b"], "mean": [1, 2], "std": [1, 2, 3, 4]}',
        '{"classes": [1, 2], "mean": [1, 2, 3], "std": [1, 2, 3]}',
        '{"classes": ["a", "b"], "mean": [1, NaN, 3], "std": [1, 2, 3]}',
        "[" * 100_000,
        "{",
    ):
        (copied / "data.json").write_text(content)
        assert str(copied / "data.json") in refusal(copied / "model_last.pt")
    (copied / "config.yaml").write_text("depth: [\n")
    assert "not YAML" in refusal(copied / "model_last.pt")


def test_torchvisions_weights_give_torchvisions_logits_under_imagenets_statistics(tmp_path):
    reference = TorchvisionDenseNet(4, (1, 1, 1, 1), 6, num_classes=5).eval()
    torch.save(reference.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    write_folder(tmp_path, {"images": {"x": 3}}, size=90)
    net = network.load(tmp_path / "net.pth", command(**LARGE))
    assert net.classes == list("01234")
    ((images, _),) = net.batches(network.find_images([str(tmp_path / "images")]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    bounds = (torch.tensor([[0.0], [1.0]]) - mean) / std  # of a pixel
    assert (images.amin(dim=(2, 3)) >= bounds[0] - 1e-6).all()
    assert (images.amax(dim=(2, 3)) <= bounds[1] + 1e-6).all()
    with torch.no_grad():
        assert torch.allclose(net.logits(images), reference(images), rtol=0, atol=1e-6)


def test_images_are_files_and_all_files_below_directories(tmp_path, capsys):
    write_folder(tmp_path, {"a": {"x": 2, "y": 1}}, size=8)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "@eaDir").mkdir()
    for name in ("@eaDir/0000.png", "._0000.png"):  # of a storage device, of macOS
        shutil.copy(tmp_path / "a" / "x" / "0000.png", tmp_path / "a" / name)
    (tmp_path / "empty").mkdir()
    found = network.find_images([str(tmp_path / "a"), str(tmp_path / "a" / "notes.txt")])
    assert [Path(path).name for path in found] == ["0000.png", "0001.png", "0002.png", "notes.txt"]
    assert capsys.readouterr().err == "note: 1 file is not read: 1 .txt\n"
    for operand in ("empty", "nowhere"):
        with pytest.raises(RunError, match=str(tmp_path / operand)):
            network.find_images([str(tmp_path / operand)])


def test_help_and_mistakes_are_answered_before_anything_heavy_is_loaded():
    code = (
        "import sys; from tools import classify, describe, extract_features\n"
        "from tools.benchmark import __main__ as benchmark\n"
        "from tools.export import __main__ as export\n"
        "for tool in (benchmark, classify, describe, export, extract_features):\n"
        "    assert tool.main(['--help']) == 0 and tool.main(['--tpo', '3']) == 2\n"
        "    assert tool.main(['nowhere', 'image']) != 0\n"
        "assert not {'torch', 'numpy', 'onnx'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m tools.") == 5


TO_ONNX = ["run", "--to", "onnx", "--output", "x.onnx"]


@pytest.mark.parametrize(
    "tool, argv, shown",
    [
        (classify, ["run"], "no image"),
        (extract_features, ["run"], "no image"),
        (export, TO_ONNX[1:], "no checkpoint"),
        (export, TO_ONNX[:3], "no --output"),
        (export, ["run", *TO_ONNX[3:]], "no --to"),
        (export, ["another", *TO_ONNX], "more than one checkpoint"),
        (export, ["run", "--to", "timm", "--output", "x", "--images", "dir"], "no effect"),
    ],
)
def test_a_command_without_its_arguments_is_refused(tool, argv, shown, capsys):
    assert tool.main(argv) == 2
    assert shown in capsys.readouterr().err


def test_testing_a_run_on_small_images_reads_its_test_images_only(copied, small_run, tmp_path):
    data = Path(shutil.copytree(small_run.parent / "data", tmp_path / "data"))
    flags = {"testOnly": True, "data": data, "nThreads": 0}
    whole = run(command(resume=copied, **flags))
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    again = run(command(resume=copied, **flags))
    assert whole.code == again.code == 0
    assert whole.out.splitlines()[-1] == again.out.splitlines()[-1]
    # Plain weights do not tell the statistics: the training images do, and cannot be read.
    alone = shutil.copy(copied / "model_last.pt", tmp_path / "alone.pt")
    refused(run(command(**NETWORK, retrain=alone, **flags)), 3, "cannot read image")


def test_an_output_file_is_replaced_only_when_asked(small_run, tmp_path, capsys):
    images, path = small_run.parent / "data" / "val", tmp_path / "output"
    path.write_text("precious")
    for tool, *argv in (
        (classify, images, f"--csv={path}"),
        (extract_features, images, f"--output={path}"),
        (export, "--to=weights", f"--output={path}"),
    ):
        line = [str(small_run), *map(str, argv)]
        assert tool.main(line) == 2
        assert path.read_text() == "precious" and "--overwrite true" in capsys.readouterr().err
        assert tool.main([*line, "--overwrite"]) == 0
        assert path.read_bytes() != b"precious"
        path.write_text("precious")
    capsys.readouterr()
    line[-1] = f"--output={tmp_path / 'nowhere' / 'output'}"
    assert tool.main(line) == 6 and "no directory" in capsys.readouterr().err
    line[-1] = f"--output={tmp_path}"
    assert tool.main(line) == 2 and "is not a file" in capsys.readouterr().err


def test_a_grey_network_and_an_adapted_one_read_grey_images(small_run, tmp_path, capsys):
    paths = network.find_images([str(small_run.parent / "data" / "val")])
    flags = ["--nChannels=1", "--inputRange=0,1"]
    with pytest.raises(RunError, match="takes 3 channels, not 1"):
        network.load(small_run, flags)
    net = network.load(small_run, [*flags, "--adaptChannels=true"])
    assert "features.conv0.weight takes 3 channels: summed into one" in capsys.readouterr().err
    (images, _), *_ = net.batches(paths)
    assert images.shape[1:] == (1, 8, 8) and 0 <= images.min() < images.max() <= 1
    colours = network.load(small_run, ["--inputRange=0,1"])
    alike = images.expand(-1, 3, -1, -1)
    assert torch.allclose(net.logits(images), colours.logits(alike), rtol=0, atol=1e-5)
    # Statistics of three channels are not those of one.
    with pytest.raises(RunError, match=r"mean and deviation .* not known") as caught:
        network.load(small_run, [flags[0], "--adaptChannels=true"])
    assert caught.value.report().endswith(", or --inputRange")
