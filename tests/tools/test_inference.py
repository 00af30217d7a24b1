"""A trained network is the same from every source of its weights; others are refused clearly."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet

import checkpoints
import models.factory
import models.state_dicts
import opts
from errors import RunError, UsageError
from faults.contract import command, refused, tiny
from fileio import tensor_files
from helpers.run_main import ROOT, run
from helpers.sample_data import write_folder
from tools import classify, extract_features
from tools.export import __main__ as export
from tools.inference import network
from tools.inference.images import Unreadable, find_images

COUNTS = {"train": {"ant": 8, "bee": 6}, "val": {"ant": 3, "bee": 4}}
NETWORK = {"dataset": "folder", "imageSize": 8, "depth": 10, "growthRate": 2}
FLAGS = command(**NETWORK)
LARGE = {"dataset": "imagenet", "imageSize": 72, "growthRate": 4, "initChannels": 6}
LARGE |= dict.fromkeys(("d1", "d2", "d3", "d4"), 1)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory) -> Path:
    """A run of two epochs on a folder of small images, which lie beside it in `data`."""
    root = tmp_path_factory.mktemp("trained")
    write_folder(root / "data", COUNTS, size=8)
    flags = {"nImages": None, "nClasses": None, "nEpochs": 2, "nThreads": 0}
    result = run(tiny(**NETWORK | flags, data=root / "data", save=root / "run"))
    assert result.code == 0, result.err
    return root / "run"


@pytest.fixture
def copied(trained_run, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def images_of(run_directory: Path) -> list[str]:
    return sorted(str(path) for path in (run_directory.parent / "data" / "val").rglob("*.png"))


def logits(net: network.LoadedModel, paths: list[str]) -> torch.Tensor:
    return torch.cat([net.logits(images) for images, _ in net.batches(paths, Unreadable())])


def by_hand(run_directory: Path) -> torch.Tensor:
    """Compute the logits of the test images without tools.inference."""
    model = models.factory.create(opts.parse(FLAGS), num_classes=2)
    models.state_dicts.load_weights(
        model, checkpoints.load_weights(run_directory / "model_last.pt")
    )
    facts = json.loads((run_directory / "data.json").read_text())
    pixels, _ = write_folder(run_directory.parent / "again", COUNTS, size=8)["val"]
    mean, std = (np.array(facts[name]) for name in ("mean", "std"))
    images = torch.from_numpy((pixels - mean) / std).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("source", ["run", "checkpoint", "renamed", "last", "alone"])
def test_a_network_is_the_same_from_every_source_of_its_weights(trained_run, tmp_path, source):
    checkpoint = checkpoints.list_checkpoints(trained_run)[0]
    path = {
        "run": trained_run,
        "checkpoint": shutil.copy(checkpoint, tmp_path),
        "renamed": shutil.copy(checkpoint, tmp_path / "renamed.pt"),
        "last": trained_run / "model_last.pt",
        "alone": shutil.copy(trained_run / "model_last.pt", tmp_path / "alone.pt"),
    }[source]
    described = (FLAGS, trained_run / "data.json") if source == "alone" else ()
    net = network.load(Path(path), *described)
    assert net.classes == ["ant", "bee"] and not net.model.training
    found, wanted = logits(net, images_of(trained_run)), by_hand(trained_run)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    # The network of the epoch before computes other logits.
    before = network.load(checkpoints.list_checkpoints(trained_run)[1])
    assert not torch.allclose(logits(before, images_of(trained_run)), wanted, rtol=0, atol=1e-3)


def refusal(*args: object) -> str:
    """The line of the error that loading ends in."""
    with pytest.raises(RunError) as error:
        network.load(*args)
    line = error.value.report()
    assert line.startswith("error: ") and "; fix: " in line
    return line


def test_the_newest_valid_checkpoint_is_taken_and_nothing_is_touched(copied, trained_run, capsys):
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


def test_given_flags_win_over_those_of_the_run_and_its_machine_is_forgotten(trained_run, copied):
    assert network.load(trained_run).opt.batchSize == 8
    assert network.load(trained_run, ["--batchSize=3"]).opt.batchSize == 3
    assert "do not fit the network" in refusal(trained_run, ["--growthRate=3"])
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("retrain: none", "retrain: gone.pt\nnGPU: 64"))
    assert network.load(copied / "model_last.pt").opt.nGPU is None


@pytest.mark.parametrize(
    "flags, classes, shown",
    [
        ([], None, "does not describe their network"),
        (FLAGS, None, "mean and deviation"),
        (["--depth=16", *FLAGS[3:]], "data.json", "do not fit the network"),
        ([*FLAGS, "--nClasses=3"], "data.json", "nClasses is 3"),
        (FLAGS, b"one\ntwo\nthree\n", "3 classes, the weights have 2"),
        (FLAGS, b"one\n\n", "line without a name"),
        (FLAGS, b"\xff\xfe\x00", "not text"),
        (FLAGS, "nowhere", "cannot read"),
    ],
)
def test_an_error_asks_for_what_plain_weights_lack(trained_run, tmp_path, flags, classes, shown):
    alone = Path(shutil.copy(trained_run / "model_last.pt", tmp_path))
    if isinstance(classes, bytes):
        (tmp_path / "names.txt").write_bytes(classes)
        classes = tmp_path / "names.txt"
    assert shown in refusal(alone, flags, classes and trained_run / classes)


INVALID = [
    "[]",
    '{"classes": ["a", "b"], "mean": [1, 2], "std": [1, 2, 3, 4]}',
    '{"classes": [1, 2], "mean": [1, 2, 3], "std": [1, 2, 3]}',
    '{"classes": ["a", "b"], "mean": [1, NaN, 3], "std": [1, 2, 3]}',
    "[" * 100_000,
    "{",
]


@pytest.mark.parametrize("content", INVALID, ids=range(len(INVALID)))
def test_an_invalid_data_json_is_one_line(copied, content):
    (copied / "data.json").write_text(content)
    assert str(copied / "data.json") in refusal(copied / "model_last.pt")


def test_missing_or_unusable_weights_are_one_line(copied, tmp_path):
    assert "no such file or directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "text.pt").write_text("hello")
    assert "is text, not a checkpoint" in refusal(tmp_path / "text.pt")
    tensor_files.save_weights(tmp_path / "vectors.pt", {"a": torch.zeros(3)})
    assert "no classifier" in refusal(tmp_path / "vectors.pt", FLAGS)
    (copied / "config.yaml").write_text("depth: [\n")
    assert "not YAML" in refusal(copied / "model_last.pt")


def test_torchvisions_weights_give_torchvisions_logits_under_imagenets_statistics(tmp_path):
    theirs = TorchvisionDenseNet(4, (1, 1, 1, 1), 6, num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth", _use_new_zipfile_serialization=False)
    write_folder(tmp_path, {"images": {"x": 3}}, size=90)
    net = network.load(tmp_path / "theirs.pth", command(**LARGE))
    assert net.classes == list("01234")
    paths = find_images([str(tmp_path / "images")])
    ((images, _),) = net.batches(paths, Unreadable())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    bounds = (torch.tensor([[0.0], [1.0]]) - mean) / std  # of a pixel
    assert (images.amin(dim=(2, 3)) >= bounds[0] - 1e-6).all()
    assert (images.amax(dim=(2, 3)) <= bounds[1] + 1e-6).all()
    with torch.no_grad():
        assert torch.allclose(net.logits(images), theirs(images), rtol=0, atol=1e-6)


def test_images_are_files_and_what_lies_below_directories(tmp_path):
    write_folder(tmp_path, {"a": {"x": 2, "y": 1}}, size=8)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    found = find_images([str(tmp_path / "a"), str(tmp_path / "a" / "notes.txt")])
    assert [Path(path).name for path in found] == ["0000.png", "0001.png", "0002.png", "notes.txt"]
    for operand in ("empty", "nowhere"):
        with pytest.raises(RunError, match=str(tmp_path / operand)):
            find_images([str(tmp_path / operand)])


def test_help_and_mistakes_are_answered_before_anything_heavy_is_loaded():
    code = (
        "import sys; from tools import classify, extract_features\n"
        "from tools.benchmark import __main__ as benchmark\n"
        "from tools.export import __main__ as export\n"
        "for tool in (benchmark, classify, export, extract_features):\n"
        "    assert tool.main(['--help']) == 0 and tool.main(['--tpo', '3']) == 2\n"
        "    assert tool.main(['nowhere', 'image']) != 0\n"
        "assert not {'torch', 'numpy', 'onnx'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m tools.") == 4


TO_ONNX = ["run", "--to", "onnx", "--output", "x.onnx"]


@pytest.mark.parametrize(
    "tool, argv",
    [
        (classify, ["run"]),
        (extract_features, ["run"]),
        (export, TO_ONNX[1:]),
        (export, TO_ONNX[:3]),
        (export, ["run", *TO_ONNX[3:]]),
        (export, ["another", *TO_ONNX]),
        (export, ["run", "--to", "timm", "--output", "x", "--images", "dir"]),
    ],
)
def test_a_command_without_its_arguments_is_refused(tool, argv):
    with pytest.raises(UsageError):
        tool.parse(argv)


def test_testing_a_run_on_small_images_reads_its_test_images_only(trained_run, copied, tmp_path):
    data = Path(shutil.copytree(trained_run.parent / "data", tmp_path / "data"))
    flags = {"testOnly": True, "data": data, "nThreads": 0}
    whole = run(command(resume=copied, **flags))
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    again = run(command(resume=copied, **flags))
    assert whole.code == again.code == 0
    assert whole.out.splitlines()[-1] == again.out.splitlines()[-1]
    # Plain weights do not tell the statistics: the training images do, and cannot be read.
    plain = command(**NETWORK, retrain=copied / "model_last.pt", **flags)
    refused(run(plain), 3, "cannot read image")


def test_a_fine_tuned_network_has_the_classes_and_statistics_of_its_own_images(
    trained_run, tmp_path
):
    counts = {"train": dict.fromkeys("xyz", 6), "val": dict.fromkeys("xyz", 2)}
    pixels, _ = write_folder(tmp_path / "data", counts, size=8)["train"]
    flags = {"data": tmp_path / "data", "save": tmp_path / "fine", "nThreads": 0, "nEpochs": 1}
    flags |= {"retrain": trained_run / "model_last.pt", "batchSize": 4}
    refused(run(command(**NETWORK | flags)), 4, "--resetClassifier true")
    assert run(command(**NETWORK | flags, resetClassifier=True)).code == 0
    net = network.load(tmp_path / "fine")
    assert net.classes == ["x", "y", "z"] and net.model.classifier.out_features == 3
    np.testing.assert_allclose(net.mean, pixels.reshape(-1, 3).mean(axis=0), rtol=1e-12)
