"""A trained network is the same one wherever its weights lie, and is fine-tuned from there."""

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
import datasets.factory
import models.factory
import models.state_dicts
import opts
from errors import CheckpointError, RunError, UsageError
from faults.contract import command, records, refused, tiny
from fileio import tensor_files
from helpers.run_main import ROOT, run
from helpers.sample_data import write_folder
from tools.inference import network
from tools.inference.images import Unreadable, check_new, find_images

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


def by_hand(run_directory: Path, weights: str = "model_last.pt") -> torch.Tensor:
    """The logits of the test images, without anything of tools.inference."""
    model = models.factory.create(opts.parse(FLAGS), num_classes=2)
    models.state_dicts.load_weights(model, checkpoints.load_weights(run_directory / weights))
    facts = json.loads((run_directory / "data.json").read_text())
    pixels, _ = write_folder(run_directory.parent / "again", COUNTS, size=8)["val"]
    mean, std = (np.array(facts[name]) for name in ("mean", "std"))
    images = torch.from_numpy((pixels - mean) / std).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.eval()(images)


def newest(run_directory: Path) -> Path:
    return checkpoints.list_checkpoints(run_directory)[0]


@pytest.mark.parametrize("place", ["run", "checkpoint", "renamed", "last", "alone"])
def test_a_network_is_the_same_from_every_place_its_weights_lie_in(trained_run, tmp_path, place):
    shutil.copy(newest(trained_run), tmp_path)
    shutil.copy(newest(trained_run), tmp_path / "renamed.pt")
    shutil.copy(trained_run / "model_last.pt", tmp_path / "alone.pt")
    path = {
        "run": trained_run,
        "checkpoint": newest(tmp_path),
        "renamed": tmp_path / "renamed.pt",
        "last": trained_run / "model_last.pt",
        "alone": tmp_path / "alone.pt",
    }[place]
    flags, classes = (FLAGS, trained_run / "data.json") if place == "alone" else ([], None)
    net = network.load(path, flags, classes)
    assert net.classes == ["ant", "bee"] and not net.model.training
    found, wanted = logits(net, images_of(trained_run)), by_hand(trained_run)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    # The network of the epoch before is another one.
    before = network.load(checkpoints.list_checkpoints(trained_run)[1])
    assert not torch.allclose(logits(before, images_of(trained_run)), wanted, rtol=0, atol=1e-3)


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
    with pytest.raises(CheckpointError, match="is damaged"):
        network.load(last)
    before.unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint among 1"):
        network.load(copied)


def test_a_run_whose_checkpoints_are_gone_names_its_model_file(copied):
    for path in checkpoints.list_checkpoints(copied):
        path.unlink()
    with pytest.raises(CheckpointError) as error:
        network.load(copied)
    assert str(copied / "model_last.pt") in error.value.report()


def test_given_flags_win_over_those_of_the_run_and_its_machine_is_forgotten(trained_run, copied):
    assert network.load(trained_run).opt.batchSize == 8
    assert network.load(trained_run, ["--batchSize=3"]).opt.batchSize == 3
    with pytest.raises(CheckpointError, match="do not fit the network"):
        network.load(trained_run, ["--growthRate=3"])
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("retrain: none", "retrain: gone.pt\nnGPU: 64"))
    assert network.load(copied / "model_last.pt").opt.nGPU is None


def refusal(*args, **kwargs) -> str:
    with pytest.raises(RunError) as error:
        network.load(*args, **kwargs)
    line = error.value.report()
    assert line.startswith("error: ") and "; fix: " in line
    return line


def test_what_plain_weights_lack_is_asked_for(trained_run, tmp_path):
    alone, facts = shutil.copy(trained_run / "model_last.pt", tmp_path), trained_run / "data.json"
    alone = Path(alone)
    assert "holds weights and not what network" in refusal(alone)
    assert "mean and deviation" in refusal(alone, FLAGS)
    assert "do not fit the network" in refusal(alone, ["--depth=16", *FLAGS[3:]], facts)
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\nthree\n")
    assert "3 classes, the weights have 2" in refusal(alone, FLAGS, names)
    names.write_text("one\n\n")
    assert "line without a name" in refusal(alone, FLAGS, names)
    names.write_bytes(b"\xff\xfe\x00")
    assert "not text" in refusal(alone, FLAGS, names)
    assert "cannot read" in refusal(alone, FLAGS, tmp_path / "nowhere")
    assert "nClasses is 3" in refusal(alone, [*FLAGS, "--nClasses=3"], facts)
    assert network.load(alone, FLAGS, facts).classes == ["ant", "bee"]


STRANGE = [
    "[]",
    "{}",
    '{"classes": ["a", "b"], "mean": [1, 2], "std": [1, 2, 3, 4]}',
    '{"classes": [1, 2], "mean": [1, 2, 3], "std": [1, 2, 3]}',
    '{"classes": ["a", "b"], "mean": [1, NaN, 3], "std": [1, 2, 3]}',
    '{"classes": ["a", "b"], "mean": "abc", "std": [1, 2, 3]}',
    "[" * 100_000,
    "{",
]


@pytest.mark.parametrize("content", STRANGE, ids=range(len(STRANGE)))
def test_strange_facts_of_a_run_are_one_line(copied, content):
    (copied / "data.json").write_text(content)
    assert str(copied / "data.json") in refusal(copied / "model_last.pt")


def test_what_is_not_there_or_no_weights_is_one_line(copied, tmp_path):
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


def test_weights_of_cifar_and_svhn_have_their_published_statistics():
    opt = opts.parse(["--dataset=cifar100"])
    assert datasets.factory.published_statistics(opt) == ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
    svhn = opts.parse(["--dataset", "svhn"])
    assert datasets.factory.published_statistics(svhn) == ((0, 0, 0), (255, 255, 255))
    assert datasets.factory.published_statistics(opts.parse(FLAGS)) is None


def test_images_are_files_and_what_lies_below_directories(tmp_path):
    write_folder(tmp_path, {"a": {"x": 2, "y": 1}}, size=8)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    found = find_images([str(tmp_path / "a"), str(tmp_path / "a" / "notes.txt")])
    assert [Path(path).name for path in found] == ["0000.png", "0001.png", "0002.png", "notes.txt"]
    for operand in ("empty", "nowhere"):
        with pytest.raises(RunError, match=str(tmp_path / operand)):
            find_images([str(tmp_path / operand)])


def test_an_output_file_is_not_replaced_unasked(tmp_path):
    path = tmp_path / "file"
    check_new(path, overwrite=False)
    path.write_text("precious")
    check_new(path, overwrite=True)
    for wrong, overwrite in ((path, False), (tmp_path, True), (tmp_path / "no" / "file", True)):
        with pytest.raises(RunError):
            check_new(wrong, overwrite)
    assert path.read_text() == "precious"


def test_help_and_mistakes_are_answered_before_anything_heavy_is_loaded():
    code = (
        "import sys; from tools import classify, extract_features as features\n"
        "from tools.export import __main__ as export\n"
        "for tool in (classify, export, features):\n"
        "    assert tool.main(['--help']) == 0 and tool.main(['--tpo', '3']) == 2\n"
        "    assert tool.main(['nowhere', 'image']) != 0\n"
        "assert not {'torch', 'numpy', 'onnx'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m tools.") == 3


# ------------------------------------------------------------------------- testing and fine-tuning


def result_line(result) -> str:
    assert result.code == 0, result.err
    return result.out.splitlines()[-1]


def test_testing_a_run_on_small_images_reads_its_test_images_only(trained_run, copied, tmp_path):
    data = Path(shutil.copytree(trained_run.parent / "data", tmp_path / "data"))
    flags = {"testOnly": True, "data": data, "nThreads": 0}
    whole = run(command(resume=copied, **flags))
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    assert result_line(run(command(resume=copied, **flags))) == result_line(whole)
    # Plain weights do not say what they expect: the training images do, and are missed.
    plain = command(**NETWORK, retrain=copied / "model_last.pt", **flags)
    refused(run(plain), 3, "cannot read image")


def test_fine_tuning_starts_from_the_features_with_a_new_classifier(trained_run, tmp_path):
    counts = {"train": dict.fromkeys("xyz", 6), "val": dict.fromkeys("xyz", 2)}
    write_folder(tmp_path / "data", counts, size=8)
    save = tmp_path / "fine"
    fine = NETWORK | {"data": tmp_path / "data", "save": save, "nThreads": 0, "batchSize": 4}
    fine |= {"nEpochs": 1, "LR": 1e-30}  # a step that changes no parameter
    source = trained_run / "model_last.pt"
    refused(run(command(**fine, retrain=source)), 4, "--resetClassifier true")
    result = run(command(**fine, retrain=source, resetClassifier=True))
    assert result.code == 0, result.err
    before, after = (checkpoints.load_weights(path) for path in (source, save / "model_last.pt"))
    for name in before:
        is_parameter = name.endswith(("weight", "bias")) and not name.startswith("classifier")
        assert torch.equal(before[name], after[name]) or not is_parameter
    assert after["classifier.weight"].shape[0] == 3  # as many as there are class directories
    moved = [name for name in before if name.endswith("running_mean")]
    assert not any(torch.equal(before[name], after[name]) for name in moved)

    assert run(command(resume=save, nEpochs=2)).code == 0
    assert len(records(save)) == 2
    net = network.load(save)
    assert net.classes == ["x", "y", "z"]
    # Its statistics are those of its own images.
    pixels, _ = write_folder(tmp_path / "again", counts, size=8)["train"]
    np.testing.assert_allclose(net.mean, pixels.reshape(-1, 3).mean(axis=0), rtol=1e-12)


def test_a_command_without_its_operands_is_refused():
    from tools import classify, extract_features
    from tools.export import __main__ as export

    for tool in (classify, extract_features):
        for argv in ([], ["run"], ["run", "image", "--depht", "40"]):
            with pytest.raises(UsageError):
                tool.parse(argv)
        assert tool.parse(["run", "image", "--depth", "40"]).main_flags == ["--depth=40"]
    wanted = ["--to", "onnx", "--output", "x.onnx"]
    for argv in (wanted, ["run", *wanted[:2]], ["run", *wanted[2:]], ["run", "two", *wanted],
                 ["run", "--to", "timm", "--output", "x", "--images", "dir"]):  # fmt: skip
        with pytest.raises(UsageError):
            export.parse(argv)
    assert export.parse(["run", *wanted, "--images", "dir"]).options.images == "dir"
